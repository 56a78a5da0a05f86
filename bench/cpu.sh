#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Measures what bench/results/kernels-cpu*.csv hold, on a machine with nothing else to do:
#
#     cpu.sh PART OUTPUT_FOLDER
#
# A part is int4, int8, int3 (1 to 4 rows), groups, curve, large, avx512 or avx2, and takes a
# minute or two on two cores; each writes a file of its own.  "cpu.sh join OUTPUT_FOLDER" then
# makes the tables of them, "cpu.sh all OUTPUT_FOLDER" does everything.  BENCH is finequant-bench,
# if not the one on the PATH.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: cpu.sh int4|int8|int3|groups|curve|large|avx512|avx2|join|all OUTPUT_FOLDER" >&2
    exit 2
fi
mkdir -p "$2"
out=$2

kernel() {
    name=$1
    shift
    "${BENCH:-finequant-bench}" kernel --backend=cpu --threads=0 --csv="$out/$name.csv" "$@"
}

few() {
    kernel "$1" --bits="${1#int}" --dtype=f16,bf16,f32 --shape=4096x4096,11008x4096 --m=1,2,3,4 \
        --seconds=0.3
}

set_of() {
    FINEQUANT_CPU_KERNELS=$1 kernel "$1" --bits=4,8,3 --dtype=f32 --m=1,2,4,64 --seconds=0.3
}

# join TABLE PART...: the comments, one heading, the rows
join() {
    table=$1
    shift
    (
        cd "$out"
        for part in "$@"; do grep '^#' "$part.csv"; done
        grep '^bits' "$1.csv"
        for part in "$@"; do grep -v -e '^#' -e '^bits' "$part.csv"; done
    ) >"$out/$table.csv"
}

case $1 in
int4 | int8 | int3) few "$1" ;;
groups) kernel groups --bits=4,8,3 --group=64,16,32,128,256,channel --m=1 --seconds=0.6 ;;
curve) kernel curve --dtype=f32,bf16 --m=1,2,4,8,16,32,64,128,256,512,1024 --seconds=0.3 ;;
large) kernel large --dtype=f32,bf16 --m=2048,4096 --seconds=0.1 ;;
avx512 | avx2) set_of "$1" ;;
join)
    join kernels-cpu int4 int8 int3 groups curve large
    for set in avx512 avx2; do cp "$out/$set.csv" "$out/kernels-cpu-$set.csv"; done
    ;;
all)
    for part in int4 int8 int3 groups curve large avx512 avx2 join; do sh "$0" "$part" "$out"; done
    ;;
*)
    echo "cpu.sh: no part '$1'" >&2
    exit 2
    ;;
esac
