#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every fuzzer's seeds, and all their beginnings, through the fuzzer's own entry.
set -eu
for seeds in "${srcdir:-.}"/tests/fuzz/seeds/*/; do
    name=$(basename "$seeds")
    printf '%s: ' "$name"
    "${top_builddir:-.}/tests/fuzz/seeds-$name" "$seeds"
done
