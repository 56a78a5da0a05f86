#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The tests that need a GPU, in a folder that tests/gpu/stage.sh filled:
#
#     run.sh [LOG_FOLDER]
#
# Says PASS or FAIL for each, then "N passed, N failed"; exits 1 if one failed.
# A test that skips has failed here: this machine is supposed to have a GPU.
# The long ones, which wait for the host most of the time, run side by side at the end: all of
# it took 9 min 17 s on 16 processors.
set -u
cd "$(dirname "$0")" || exit 2
logs=${1:-logs}
mkdir -p "$logs"
LD_LIBRARY_PATH=$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
passed=0
failed=0

# report NAME STATUS: of a test with its output in LOG_FOLDER/NAME.log
report() {
    if [ "$2" -eq 0 ]; then
        echo "PASS $1"
        passed=$((passed + 1))
    else
        echo "FAIL $1: status $2"
        tail -n 25 "$logs/$1.log"
        failed=$((failed + 1))
    fi
}

# check NAME COMMAND...: one test, waited for
check() {
    name=$1
    shift
    timeout 300 "$@" >"$logs/$name.log" 2>&1
    report "$name" $?
}

# start NAME COMMAND...: one that finish() waits for and reports
started=
start() {
    name=$1
    shift
    started="$started $name"
    (
        timeout 540 "$@" >"$logs/$name.log" 2>&1
        echo $? >"$logs/$name.status"
    ) &
}
finish() {
    wait
    for name in $started; do
        report "$name" "$(cat "$logs/$name.status")"
    done
}

sanitize() {
    name=$1 tool=$2
    shift 2
    if command -v compute-sanitizer >/dev/null; then
        start "$name" env FINEQUANT_TEST_ROUNDS=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 --launch-timeout 120 "$@"
    else
        echo "compute-sanitizer is not here: $name not run"
    fi
}

check backend bin/test-backend
check synthetic bin/test-synthetic
check ipc bin/test-ipc

# The bench: every kind of matrix, and layers of a model, with errors of what its graphs wrote.
check bench-kernel bin/finequant-bench kernel --backend=cuda --shape=300x336,512x1024 --bits=8,4,3 \
    --group=32,64,channel --zero=no,yes --dtype=f16,bf16 --m=1,17,64,70,300 --rotate-mib=8 \
    --csv="$logs/bench.csv" --clocks="$logs/clocks.csv"
check bench-kernel-clocks awk -F, '/^[0-9]/ { rows++; bad += !($8 > 100 && $8 < 4000 && $9 > 100) }
    END { print rows " rows, " bad " out of range"; exit rows != 360 || bad }' "$logs/clocks.csv"
check bench-kernel-errors awk -F, '/^[0-9]/ { rows++; bad += !($NF < ($4 == "bf16" ? 5e-3 : 1e-3)) }
    END { print rows " rows, " bad " wrong"; exit rows != 360 || bad }' "$logs/bench.csv"
check bench-gated bin/finequant-bench kernel --backend=cuda --n=512 --k=1024 \
    --m=1,17,40,64,70 --rotate-mib=8 --gate=yes --bias=yes --residual=yes --activation=silu \
    --csv="$logs/gated.csv"
check bench-gated-errors awk -F, '/^[0-9]/ { rows++; bad += !($NF < 1e-3) }
    END { print rows " rows, " bad " wrong"; exit rows != 5 || bad }' "$logs/gated.csv"
check bench-model bin/finequant-bench model --arch=opt-125m --layers=3 --m=1,8 --bits=8,4,3
check bench-model-errors awk '/^ *[0-9]/ { rows++; bad += !($NF < 1e-3) }
    END { print rows " rows, " bad " wrong"; exit rows != 6 || bad }' "$logs/bench-model.log"

# The daemon on the GPU, by the integration tests and by device buffers.
FINEQUANTD=$PWD/bin/finequantd FINEQUANT_TEST_BACKEND=cuda
FINEQUANT_LIBRARY=$PWD/lib/libfinequant.so.0
FINEQUANT_HARNESS=$PWD/python FINEQUANT_PYTHON=$PWD/python PYTHONDONTWRITEBYTECODE=1
export FINEQUANTD FINEQUANT_TEST_BACKEND FINEQUANT_LIBRARY FINEQUANT_HARNESS FINEQUANT_PYTHON
export PYTHONDONTWRITEBYTECODE
check device-buffers python3 python/device-buffers.py
for test in serve library checkpoint-formats refusals quotas lifecycle crashes onecopy malformed; do
    check "daemon-$test" python3 "python/$test.py"
done

start conformance env FINEQUANT_TEST_ROUNDS=8 bin/test-conformance cuda
start conformance-seed-2 env FINEQUANT_TEST_SEED=2 FINEQUANT_TEST_ROUNDS=8 bin/test-conformance cuda
sanitize memcheck memcheck bin/test-conformance cuda
sanitize racecheck-loading racecheck bin/test-synthetic
# The kernels without Hopper's instructions.  racecheck has these alone: what orders the Hopper
# kernels' copies are mbarriers, by which it reports hazards (kernels/cuda/NOTES.md).
export FINEQUANT_CUDA_KERNELS=sm80
start conformance-sm80 env FINEQUANT_TEST_ROUNDS=8 bin/test-conformance cuda
sanitize racecheck racecheck bin/test-conformance cuda
finish

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
