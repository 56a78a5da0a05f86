#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every manual page is clean for mandoc's lint, and the long options of a command's page are those of
# its --help, no more and no fewer.
set -eu
srcdir=${srcdir:-.}
builddir=${top_builddir:-.}
mandoc=${MANDOC:-mandoc}
command -v "$mandoc" >/dev/null || { echo "SKIP: no mandoc"; exit 77; }

failed=0
for page in "$srcdir"/man/*.[1-8]; do
    "$mandoc" -T lint -W warning "$page" || { echo "$page: lint"; failed=1; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options_of() {
    grep -oE -- '(^|[^[:alnum:]-])--[a-z][a-z0-9-]*' | grep -oE -- '--[a-z][a-z0-9-]*' | sort -u
}
for page in finequantd.8 finequantctl.1 finequant-quantize.1 finequant-bench.1; do
    command=${page%.*}
    {
        "$builddir/$command" --help
        # a command with subcommands lists them as "  name ..." under "Commands:"
        for sub in $("$builddir/$command" --help | sed -n '/^Commands:/,/^$/s/^  \([a-z][a-z]*\).*/\1/p'); do
            "$builddir/$command" "$sub" --help
        done
    } >"$work/text"
    options_of <"$work/text" >"$work/help"
    # width: a hyphenated option must not be broken over two lines
    "$mandoc" -T ascii -O width=1000 "$srcdir/man/$page" | sed 's/.\x08//g' | options_of >"$work/man"
    if ! diff "$work/help" "$work/man" >"$work/diff"; then
        echo "$page: '<' is only in --help, '>' only in the page:"
        cat "$work/diff"
        failed=1
    fi
done
exit $failed
