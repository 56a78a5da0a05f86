# SPDX-License-Identifier: Apache-2.0

# finequant-quantize: one file a subcommand.
bin_PROGRAMS += finequant-quantize
finequant_quantize_SOURCES = cli/finequant-quantize.c cli/quantize-cli.h cli/quantize-options.c \
	cli/quantize-convert.c cli/quantize-copy.c cli/quantize-inspect.c cli/quantize-inspect.h \
	cli/quantize-progress.c cli/quantize-progress.h cli/quantize-report.c cli/quantize-report.h \
	cli/quantize-run.c cli/quantize-svg.c
finequant_quantize_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS)
finequant_quantize_LDADD = $(MODEL_LIBS) $(JANSSON_LIBS)
if HAVE_CMOCKA
check_PROGRAMS += cli/test-quantize-progress
TESTS += cli/test-quantize-progress
cli_test_quantize_progress_SOURCES = cli/test-quantize-progress.c cli/quantize-progress.c \
	cli/quantize-progress.h
cli_test_quantize_progress_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
cli_test_quantize_progress_LDADD = $(CMOCKA_LIBS)
endif
# finequant-bench: one file a subcommand.
bin_PROGRAMS += finequant-bench
finequant_bench_SOURCES = cli/finequant-bench.c cli/bench.h cli/bench-options.c cli/bench-time.c \
	cli/bench-rivals.c cli/bench-kernel.h cli/bench-kernel.c cli/bench-model.h cli/bench-model.c \
	cli/bench-model-step.c cli/bench-gemm.c
finequant_bench_CPPFLAGS = $(AM_CPPFLAGS) $(OPENBLAS_CFLAGS)
finequant_bench_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS)
finequant_bench_LDADD = libfinequant.la
# What it measures on a GPU; in every tarball.
BENCH_CUDA_SOURCES = cli/bench-cuda.h cli/bench-cuda.c cli/bench-cublas.c cli/bench-check.h \
	cli/bench-check.c cli/bench-kernel-cuda.c cli/bench-cuda-kernels.cu
EXTRA_DIST += $(BENCH_CUDA_SOURCES)
if HAVE_CUDA
noinst_LTLIBRARIES += libfqbenchcuda.la
libfqbenchcuda_la_SOURCES = $(BENCH_CUDA_SOURCES)
finequant_bench_LDADD += libfqbenchcuda.la
endif
finequant_bench_LDADD += $(KERNEL_LIBS) $(OPENBLAS_LIBS)
dist_check_SCRIPTS += cli/test-bench.sh
TESTS += cli/test-bench.sh
if HAVE_CMOCKA
check_PROGRAMS += cli/test-check
TESTS += cli/test-check
cli_test_check_SOURCES = cli/test-check.c cli/bench-check.c cli/bench-check.h
cli_test_check_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
cli_test_check_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
endif
# finequantctl: one file a subcommand.
bin_PROGRAMS += finequantctl
finequantctl_SOURCES = cli/finequantctl.c cli/ctl.h cli/ctl-text.c cli/ctl-clients.c cli/ctl-list.c \
	cli/ctl-load.c cli/ctl-ping.c cli/ctl-show.c cli/ctl-shutdown.c cli/ctl-stats.c \
	cli/ctl-status.c cli/ctl-unload.c
finequantctl_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS)
finequantctl_LDADD = libfinequant.la $(JANSSON_LIBS)
