#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Measures what bench/results/kernels-h200.csv, clocks-h200.csv, model-h200.csv, counters-h200.csv,
# floors-h200.csv and loading-h200.csv hold, in a folder that tests/gpu/stage.sh filled, on a machine with one H200:
#
#     h200.sh PART OUTPUT_FOLDER
#
# A part is decode, prefill, groups, curve, chain, model, counters, floors or loading and takes about
# a minute; each writes files of its own.  "h200.sh join OUTPUT_FOLDER" then makes the first three tables of them.
# CUBLAS names the library where the loader does not find it.  counters wants ncu.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: h200.sh decode|prefill|groups|curve|chain|model|counters|floors|loading|join OUTPUT_FOLDER" >&2
    exit 2
fi
mkdir -p "$2"
part=$1
out=$(cd "$2" && pwd)
cd "$(dirname "$0")"
LD_LIBRARY_PATH=$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH

cublas=${CUBLAS:-}
if [ -z "$cublas" ] && ! ldconfig -p 2>/dev/null | grep -q 'libcublas\.so\.1[23]'; then
    cublas=$(find / -name 'libcublas.so.1[23]' -not -path '/proc/*' 2>/dev/null | head -n 1)
fi

# bench NAME COMMAND OPTION...: one table, cut off before a lease of ten minutes is
bench() {
    name=$1 command=$2
    shift 2
    status=0
    timeout 480 bin/finequant-bench "$command" --backend=cuda --csv="$out/$name.csv" "$@" \
        >"$out/$name.txt" || status=$?
    cat "$out/$name.txt"
    return $status
}

kernel() {
    name=$1
    shift
    bench "$name" kernel ${cublas:+"--cublas=$cublas"} --clocks="$out/clocks.${name#*.}.csv" "$@"
}

# counters BITS DTYPE NxK M [GROUP ZERO]: Nsight Compute's counters of one launch, by name, as lines
# of a table.  The clock is left as it is; the launch is alone, so its start and end overlap with no
# other's.
counters() {
    group=${5:-64} zero=${6:-no}
    ncu --clock-control none --kernel-name 'regex:hopper_(decode|prefill)' --launch-skip 6 \
        --launch-count 1 --csv --page raw --metrics "$metrics" bin/finequant-bench kernel \
        --backend=cuda --bits="$1" --dtype="$2" --shape="$3" --m="$4" --group="$group" \
        --zero="$zero" --seconds=0.01 \
        >"$out/ncu.txt" 2>&1 || {
        cat "$out/ncu.txt"
        return 1
    }
    python3 - "$out/ncu.txt" "$1,$group,$zero,$2,$3,$4" "$metrics" <<'END'
import csv, sys
asked = sys.argv[3].split(",")
rows = [row for row in csv.reader(open(sys.argv[1])) if len(row) > len(asked)]
for name, unit, value in zip(*rows):
    if name in asked:
        print(sys.argv[2], name, unit, value.replace(",", ""), sep=",")
END
}
metrics=gpu__time_duration.sum,sm__cycles_active.avg,smsp__inst_executed.sum
metrics=$metrics,smsp__issue_active.avg.pct_of_peak_sustained_active
metrics=$metrics,sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active
metrics=$metrics,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
metrics=$metrics,sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
metrics=$metrics,sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active
metrics=$metrics,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed
metrics=$metrics,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
for reason in long_scoreboard short_scoreboard wait math_pipe_throttle dispatch_stall gmma \
    no_instruction not_selected selected barrier branch_resolving mio_throttle; do
    metrics=$metrics,smsp__average_warps_issue_stalled_${reason}_per_issue_active.ratio
done

# OPT-175B, Llama-70B and the 8B class
shapes=12288x12288,49152x12288,12288x49152,28672x8192,8192x28672,4096x4096,14336x4096

case $part in
decode) kernel kernels.decode --shape=$shapes --bits=4,8,3 --dtype=f16,bf16 --m=1,2,4,8,16,32,64 ;;
prefill)
    kernel kernels.prefill --shape=$shapes --bits=4,8,3 --dtype=f16,bf16 --m=128,256,1024,2048,4096
    ;;
groups)
    kernel kernels.groups --shape=12288x12288 --bits=4,8,3 --group=64,16,32,128,256,channel \
        --zero=no,yes --m=1,16,64,256,2048
    ;;
curve)
    kernel kernels.curve --shape=12288x12288 --bits=4,8,3 \
        --m=1,2,3,4,6,8,12,16,24,32,33,48,64,65,96,97,128,129,160,192,224,256,257,320,384,448,512,513,640,768,1024,1025,1300,1536,2048,3072,4096
    ;;
chain) bench model.chain model --arch=opt-175b --layers=1 --bits=4,8,3 --m=1,16 ;;
model)
    for arch in opt-13b llama-70b opt-66b opt-175b; do
        bench "model.$arch" model --arch=$arch --m=1,8,32
    done
    ;;
counters)
    table=$out/counters-h200.csv
    {
        echo "# $(ncu --version | tail -n 1), one launch each; h200.sh counters"
        echo "bits,group,zero,dtype,shape,m,counter,unit,value"
        for m in 1 16 32 64; do counters 4 f16 12288x12288 $m; done
        for m in 1 16; do counters 3 f16 12288x12288 $m; done
        counters 4 bf16 12288x12288 1
        counters 4 f16 4096x4096 1
        for bits in 4 8; do counters $bits bf16 12288x12288 2048; done
        counters 8 f16 12288x12288 2048
        # other groups, the farthest from what their bytes predict
        for m in 1 64; do
            counters 4 f16 12288x12288 $m channel yes
            counters 4 f16 12288x12288 $m 16 yes
        done
        counters 3 f16 12288x12288 1 64 yes
        counters 8 f16 12288x12288 64 16 yes
        counters 4 f16 4096x4096 128
    } >"$table"
    grep -c . "$table"
    ;;
floors)
    {
        echo "# cycles of a multiprocessor for a tile of a strip, 64 by 64; h200.sh floors"
        bin/floors
    } >"$out/floors-h200.csv"
    cat "$out/floors-h200.csv"
    ;;
loading)
    {
        echo "# 16384 rows of 16384 columns; mib: bytes read; h200.sh loading"
        bin/loading
    } >"$out/loading-h200.csv"
    cat "$out/loading-h200.csv"
    ;;
join)
    for table in kernels clocks model; do
        grep -h '^#' "$out/$table".*.csv >"$out/$table-h200.csv.new"
        grep -hv '^#' "$out/$table".*.csv | awk '!/^[a-z]+,/ || !seen[$0]++' \
            >>"$out/$table-h200.csv.new"
        mv "$out/$table-h200.csv.new" "$out/$table-h200.csv"
    done
    ;;
*)
    echo "h200.sh: no part '$part'" >&2
    exit 2
    ;;
esac
