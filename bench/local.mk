# SPDX-License-Identifier: Apache-2.0
# On a GPU machine, see tests/gpu/stage.sh: what redraws results/kernels-h200.csv.
EXTRA_DIST += bench/kernel-table.py
if HAVE_CUDA
check_PROGRAMS += bench/kernel-times
bench_kernel_times_SOURCES = bench/kernel-times.c
bench_kernel_times_LDADD = $(KERNEL_LIBS)
endif
EXTRA_DIST += bench/results/kernels-h200.csv bench/results/compute-sanitizer-h200.txt \
	bench/results/kernels-cpu.csv bench/results/gpu-tests-h200.txt bench/results/malformed-frames.txt
