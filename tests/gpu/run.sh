#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The tests that need a GPU, in a folder that tests/gpu/stage.sh filled:
#
#     run.sh [LOG_FOLDER]
#
# Says PASS or FAIL for each, then "N passed, N failed"; exits 1 if one failed.
# A test that skips has failed here: this machine is supposed to have a GPU.
set -u
cd "$(dirname "$0")" || exit 2
logs=${1:-logs}
mkdir -p "$logs"
LD_LIBRARY_PATH=$PWD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
passed=0
failed=0

# check NAME COMMAND...: one test, with its output in LOG_FOLDER/NAME.log
check() {
    name=$1
    shift
    if timeout 300 "$@" >"$logs/$name.log" 2>&1; then
        echo "PASS $name"
        passed=$((passed + 1))
    else
        echo "FAIL $name: status $?"
        tail -n 25 "$logs/$name.log"
        failed=$((failed + 1))
    fi
}

sanitize() {
    tool=$1
    shift
    check "$tool" env FINEQUANT_TEST_ROUNDS=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 --launch-timeout 120 "$@"
}

check backend bin/test-backend
check synthetic bin/test-synthetic
check conformance env FINEQUANT_TEST_ROUNDS=8 bin/test-conformance cuda
check conformance-seed-2 env FINEQUANT_TEST_SEED=2 FINEQUANT_TEST_ROUNDS=8 bin/test-conformance cuda
check ipc bin/test-ipc

# The daemon on the GPU, by the integration tests and by device buffers.
FINEQUANTD=$PWD/bin/finequantd FINEQUANT_TEST_BACKEND=cuda
FINEQUANT_LIBRARY=$PWD/lib/libfinequant.so.0
FINEQUANT_HARNESS=$PWD/python FINEQUANT_PYTHON=$PWD/python PYTHONDONTWRITEBYTECODE=1
export FINEQUANTD FINEQUANT_TEST_BACKEND FINEQUANT_LIBRARY FINEQUANT_HARNESS FINEQUANT_PYTHON
export PYTHONDONTWRITEBYTECODE
check device-buffers python3 python/device-buffers.py
for test in serve checkpoint-formats refusals quotas lifecycle crashes onecopy malformed; do
    check "daemon-$test" python3 "python/$test.py"
done

if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck bin/test-conformance cuda
    sanitize racecheck bin/test-conformance cuda
else
    echo "compute-sanitizer is not here: not run"
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
