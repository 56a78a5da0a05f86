# SPDX-License-Identifier: Apache-2.0

bin_PROGRAMS += finequant-quantize
finequant_quantize_SOURCES = cli/quantize.c
finequant_quantize_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS)
finequant_quantize_LDADD = $(MODEL_LIBS) $(JANSSON_LIBS)
# finequant-bench: one file a subcommand.
bin_PROGRAMS += finequant-bench
finequant_bench_SOURCES = cli/finequant-bench.c cli/bench.h cli/bench-options.c cli/bench-time.c \
	cli/bench-rivals.c cli/bench-kernel.c cli/bench-gemm.c
finequant_bench_CPPFLAGS = $(AM_CPPFLAGS) $(OPENBLAS_CFLAGS)
finequant_bench_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS)
finequant_bench_LDADD = libfinequant.la $(KERNEL_LIBS) $(OPENBLAS_LIBS)
dist_check_SCRIPTS += cli/test-bench.sh
TESTS += cli/test-bench.sh
