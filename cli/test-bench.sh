#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# finequant-bench refuses wrong options by name and value, and `kernel` measures every kind of matrix
# with results within the documented error, in a table and in CSV.
set -eu
bench=${top_builddir:-.}/finequant-bench
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# refused STATUS "what the message says" ARGUMENT...
refused() {
    expected=$1 says=$2
    shift 2
    status=0
    "$bench" "$@" >"$work/out" 2>"$work/err" || status=$?
    if [ "$status" != "$expected" ] || ! grep -qF -- "$says" "$work/err"; then
        echo "finequant-bench $*: status $status, expected $expected and '$says', got:"
        cat "$work/err"
        failed=1
    fi
}
refused 2 "no command"
refused 2 "no command 'nope'" nope
refused 2 "--bits is '5', allowed are 8, 4 and 3" kernel --bits=5
refused 2 "--bits needs a value" kernel --bits
refused 2 "no option --foo" kernel --foo
refused 2 "'extra' is no option" kernel extra
refused 2 "--m is '1,,2'" kernel --m=1,,2
refused 2 "--m is '65537'" kernel --m=65537
refused 2 "--group is '24'" kernel --group=24
refused 2 "--threads is '-1'" kernel --threads=-1
refused 2 "--n is '0'" kernel --n=0
refused 2 "--k is '1e3'" kernel --k=1e3
refused 2 "--rotate-mib is 'all'" kernel --rotate-mib=all
refused 2 "--seconds is 'nan'" kernel --seconds=nan
refused 2 "--dtype is 'f8'" kernel --dtype=f8
refused 2 "--zero is 'maybe'" kernel --zero=maybe
refused 2 "--bits is '8,4,'" kernel --bits=8,4,
refused 2 "--group is '64,24'" kernel --group=64,24
refused 2 "--dtype is 'f16,f8'" kernel --dtype=f16,f8
refused 2 "--shape is '128'" kernel --shape=128
refused 2 "--shape is '128x0'" kernel --shape=128x0
refused 2 "--shape is '128x64x32'" kernel --shape=128x64x32
refused 2 "--shape is '128x64,'" kernel --shape=128x64,
refused 2 "--shape is 'x64'" kernel --shape=x64
refused 2 "--gate is 'no,yes'" kernel --gate=no,yes
refused 2 "--activation is 'tanh'" kernel --activation=tanh
refused 13 "--gate is measured on the cuda backend, not on 'cpu'" kernel --gate=yes
refused 13 "--bias is measured on the cuda backend" kernel --backend=reference --bias=yes
refused 13 "--residual is measured on the cuda backend" kernel --residual=yes
refused 13 "--activation is measured on the cuda backend" kernel --activation=silu
refused 13 "--clocks is measured on the cuda backend" kernel --clocks=/nowhere/clocks.csv
refused 2 "--cublas is ''" kernel --cublas=
refused 3 "no backend 'tpu'" kernel --backend=tpu
refused 3 "group size is 128" kernel --group=128 --k=100
refused 8 "/nowhere/table.csv" kernel --csv=/nowhere/table.csv
refused 2 "--arch is needed" model
refused 2 "--arch is 'gpt-2', allowed are opt-125m" model --arch=gpt-2
refused 2 "--layers is '13', allowed are 1 to 12 for opt-125m" model --arch=opt-125m --layers=13
refused 2 "--layers is '0'" model --arch=opt-125m --layers=0
refused 2 "--m is '0'" model --arch=opt-125m --m=0
refused 3 "no backend 'tpu'" model --arch=opt-125m --backend=tpu
refused 3 "group size is 800" model --arch=opt-125m --backend=cpu --group=800
refused 8 "/nowhere/table.csv" model --arch=opt-125m --csv=/nowhere/table.csv
refused 2 "--model is needed" gemm
refused 2 "--clients is '0'" gemm --clients=0
refused 2 "--clients is '1,1025'" gemm --clients=1,1025
refused 2 "--requests is '0'" gemm --requests=0
refused 2 "--tensor is ''" gemm --tensor=
refused 17 "/nowhere/socket" gemm --model=none --socket=/nowhere/socket

# measured "FIELDS,OF,CSV" BOUND ARGUMENT...: the row for m = 1 begins so, and errs less
measured() {
    begins=$1 bound=$2
    shift 2
    "$bench" kernel --n=96 --k=160 --m=1,70 --threads=1 --rotate-mib=1 --seconds=0.01 \
        --csv="$work/csv" "$@" >"$work/out"
    if ! awk -F, -v begins="$begins,1,96,160,1," -v bound="$bound" '
        NR == 1 { comment = /^# / }
        NR == 2 { header = $0 == "bits,group,zero,dtype,threads,n,k,m,us,read_us,sgemm_us,err" }
        NR == 3 { row = index($0, begins) == 1 && $9 > 0 && $12 < bound }
        END { exit !(comment && header && row && NR == 4) }' "$work/csv"; then
        echo "finequant-bench kernel $*: expected $begins and errors below $bound, got:"
        cat "$work/csv"
        failed=1
    fi
}
measured 4,64,0,f16 1e-3
measured 8,channel,1,bf16 5e-3 --bits=8 --group=channel --zero=yes --dtype=bf16
measured 3,32,1,f32 1e-5 --bits=3 --group=32 --zero=yes --dtype=f32
measured 4,16,0,f16 1e-3 --group=16 --backend=reference

# A row for every combination of the lists, once a heading.
"$bench" kernel --shape=32x64,64x96 --bits=4,3 --group=16,channel --zero=no,yes --dtype=f16,bf16 --m=1,2 \
    --threads=1 --rotate-mib=1 --seconds=0.001 --csv="$work/csv" >"$work/out"
combinations=$(sed 1,2d "$work/csv" | cut -d, -f1-8 | sort -u | wc -l)
if [ "$combinations" != 64 ] || [ "$(wc -l <"$work/csv")" != 66 ] ||
    ! head -n 1 "$work/csv" | grep -q -- '--shape=32x64,64x96 --bits=4,3'; then
    echo "lists: expected 64 combinations in 66 lines below the command, got $combinations:"
    cat "$work/csv"
    failed=1
fi

# The picture of such a table is XML with a line and a roofline for each bit width.
if [ -n "${PYTHON3:-}" ]; then
    for options in "" "--n=64 --k=96 --group=channel --dtype=bf16 --zero=1 --peak=0.5"; do
        # shellcheck disable=SC2086 # words
        "$PYTHON3" "${top_srcdir:-.}/bench/plot-kernels.py" $options "$work/csv" "$work/svg"
        "$PYTHON3" -c 'import sys, xml.dom.minidom as dom; dom.parse(sys.argv[1])' "$work/svg"
        if [ "$(grep -c 'dasharray.*points' "$work/svg")" != 2 ] ||
            [ "$(grep -c 'stroke-width="2.4" points' "$work/svg")" -lt 2 ]; then
            echo "plot-kernels.py $options: expected two lines and two rooflines, got:"
            cat "$work/svg"
            failed=1
        fi
    done
    if "$PYTHON3" "${top_srcdir:-.}/bench/plot-kernels.py" --group=48 "$work/csv" "$work/svg" 2>"$work/err" ||
        ! grep -q 'no row has group 48' "$work/err"; then
        echo "plot-kernels.py --group=48: expected a refusal, got:"
        cat "$work/err"
        failed=1
    fi
fi

# A table of the cuda backend against the goals: here one row reaches its own, and another does not.
if [ -n "${PYTHON3:-}" ]; then
    cat >"$work/csv" <<CSV
# NVIDIA H200, cuBLAS 13.0.0: finequant-bench kernel
bits,group,zero,dtype,n,k,m,us,read_us,cublas_us,err
4,64,0,f16,12288,12288,1,22,20,80,0.0002
4,64,0,f16,12288,12288,16,25,20,80,0.0002
4,16,0,f16,12288,12288,1,24.2,22,80,0.0002
3,64,0,f16,4096,4096,1,5,4,,0.002
CSV
    "$PYTHON3" "${top_srcdir:-.}/bench/summary.py" "$work/csv" >"$work/out"
    for line in "12288×12288 int4 f16 | 1.10, 3.64× | 1.25, 3.20× |" \
        "64 MiB of weights and more: time over read | ≤ 1.15 | 1 of 2 | 1.25 (int4 g64 f16 12288×12288 M=16)" \
        "below 64 MiB: time over read | ≤ 1.35 | 1 of 1 | 1.25 (int3 g64 f16 4096×4096 M=1)" \
        "int4 over cuBLAS | ≥ 3.5 | 1 of 2 | 3.20" "int3 over cuBLAS | ≥ 4.3 | not measured" \
        "what the bytes predict | ≤ 1.1 | 1 of 1 | 1.00 (int4 g16" "thousandths | ≤ 1.0 | 3 of 4 | 2.00"; do
        grep -qF "$line" "$work/out" || { echo "summary.py: no '$line' in:"; cat "$work/out"; failed=1; }
    done
fi

# A layer of a model: the bytes are those of its weights, scales, X and Y.
"$bench" model --backend=cpu --arch=opt-125m --layers=1 --bits=4,3 --m=1,5 --rotate-mib=1 \
    --csv="$work/csv" >"$work/out"
if ! awk -F, '
    NR == 1 { comment = /^# cpu.*--arch=opt-125m/ }
    NR == 2 { header = $0 == "arch,layers,bits,group,dtype,m,ms,read_ms,tokens_per_s,bytes" }
    NR > 2 {
        weights = 12 * 768 * 768
        rows[$3 "," $6] = index($0, "opt-125m,1," $3 ",64,f16,") == 1 && $7 > 0 && $8 > 0 &&
            $9 > 0.999 * $6 / $7 * 1000 && $9 < 1.001 * $6 / $7 * 1000 &&
            $10 == weights * $3 / 8 + weights / 64 * 2 + $6 * 2 * 768 * (4 + 2 + 5 + 5)
    }
    END { exit !(comment && header && rows["4,1"] && rows["4,5"] && rows["3,1"] && rows["3,5"] && NR == 6) }
    ' "$work/csv" || ! awk 'NR > 3 { rows++; if (!($NF < 1e-3)) exit 1 } END { exit rows != 4 }' "$work/out"; then
    echo "finequant-bench model: expected four rows with exact bytes and small errors, got:"
    cat "$work/csv" "$work/out"
    failed=1
fi

# Where there is no GPU, or no CUDA in this build, the cuda backend says so itself.
# on_cuda "FIELDS,OF,CSV" COMMAND OPTION...
on_cuda() {
    fields=$1 status=0
    shift
    "$bench" "$@" --backend=cuda --m=1 --rotate-mib=1 --csv="$work/csv" >"$work/out" 2>"$work/err" ||
        status=$?
    case $status in
    0) grep -qx "$fields" "$work/csv" && return ;;
    13 | 17) grep -q 'CUDA' "$work/err" && return ;;
    esac
    echo "finequant-bench $*: status $status, expected a table with $fields, or no CUDA, got:"
    cat "$work/csv" "$work/err"
    failed=1
}
on_cuda bits,group,zero,dtype,n,k,m,us,read_us,cublas_us,err kernel --n=64 --k=64
on_cuda arch,layers,bits,group,dtype,m,ms,read_ms,tokens_per_s,bytes model --arch=opt-125m --layers=1
exit $failed
