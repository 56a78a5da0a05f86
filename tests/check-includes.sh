#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Holds the rule of who may include whom: every `#include "file"` of a folder must name a file of
# that folder or of one it may stand on.  Same-named headers in two folders are refused, since the
# rule could not tell them apart.
set -eu
cd "${srcdir:-.}"

may_include() {
    case $1 in
    base) echo base ;;
    kernels) echo base kernels ;;
    proto) echo base proto ;;
    model) echo base kernels model ;;
    daemon) echo base proto kernels model daemon ;;
    client) echo base proto client ;;
    cli) echo base kernels model proto client cli ;;
    esac
}

list=$(mktemp)
trap 'rm -f "$list"' EXIT
find base kernels proto model daemon client cli \( -name '*.h' -o -name '*.cuh' -o -name '*.inc' \) >"$list"
twice=$(sed 's|.*/||' "$list" | sort | uniq -d)
failed=0
if [ -n "$twice" ]; then
    echo "two headers share a name: $twice"
    failed=1
fi

checked=0
for folder in base kernels proto model daemon client cli; do
    allowed=$(may_include "$folder")
    for file in $(find "$folder" -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh'); do
        for header in $(sed -n 's/^ *# *include "\(.*\)".*/\1/p' "$file"); do
            [ "$header" != config.h ] || continue # configure's
            owner=$(grep "/${header##*/}\$" "$list" | head -n 1 | cut -d/ -f1)
            checked=$((checked + 1))
            case " $allowed " in
            *" ${owner:-nowhere} "*) ;;
            *)
                echo "$file includes \"$header\" of ${owner:-nowhere}; $folder may include: $allowed"
                failed=1
                ;;
            esac
        done
    done
done

# model stands on the kernels' matrix form alone, not on what runs it.
if grep -ln '#include "backend' $(find model -name '*.[ch]'); then
    echo "model may include kernels/matrix.h alone"
    failed=1
fi
[ "$checked" -gt 20 ] || { echo "only $checked includes found: is this the source tree?"; failed=1; }
echo "$checked includes checked"
exit $failed
