#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Puts what tests/gpu/run.sh needs into a folder that can be copied to a machine
# with a GPU: the built tests, the libraries they load, and the scripts.
#
#     tests/gpu/stage.sh BUILD_FOLDER STAGE_FOLDER
#
# Brings the build up to date first, the tests' programs, too: make alone leaves those as they were.
set -eu
if [ $# -ne 2 ]; then
    echo "usage: stage.sh BUILD_FOLDER STAGE_FOLDER" >&2
    exit 2
fi
build=$1
stage=$2
source=$(cd "$(dirname "$0")/../.." && pwd)
make -C "$build" all >/dev/null
make -C "$build" check TESTS= >/dev/null
rm -rf "$stage"
mkdir -p "$stage/bin" "$stage/lib"

# Programs, by their path in the build folder.  Libtool keeps a program that needs a shared library
# of the tree in .libs.
for program in kernels/test-conformance kernels/test-backend kernels/test-synthetic \
    kernels/cuda/test-ipc bench/floors bench/loading finequant-bench; do
    folder=$(dirname "$program") name=$(basename "$program")
    if [ -f "$build/$folder/.libs/$name" ]; then
        cp "$build/$folder/.libs/$name" "$stage/bin/"
    else
        cp "$build/$program" "$stage/bin/"
    fi
done
cp "$build/finequantd" "$stage/bin/"
strip --strip-debug "$stage"/bin/* # which leaves the kernels' line numbers
mkdir -p "$stage/python"
cp "$source"/tests/integration/*.py "$source/tests/python/formats.py" "$source/client/python/finequant.py" \
    "$source/tests/gpu/device-buffers.py" "$stage/python/"
cp "$source/tests/gpu/run.sh" "$source/bench/h200.sh" "$stage/"
cp -L "$build/.libs/libfinequant.so.0" "$stage/lib/"

# Everything they load but the C library, which the other machine's loader must match.
for program in "$stage"/bin/* "$stage/lib/libfinequant.so.0"; do
    ldd "$program"
done | awk '$3 ~ /^\// { print $3 }' | sort -u | while read -r library; do
    case $(basename "$library") in
    libc.so* | libm.so* | libdl.so* | librt.so* | libpthread.so* | ld-linux*) ;;
    *) cp -L "$library" "$stage/lib/" ;;
    esac
done
echo "$stage: $(du -sh "$stage" | cut -f1)"
