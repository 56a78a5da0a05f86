# SPDX-License-Identifier: Apache-2.0
# On a GPU machine, see tests/gpu/stage.sh: what fills results/*-h200.csv.
EXTRA_DIST += bench/cpu.sh bench/summary-cpu.py bench/goals.py bench/multiplier.c
EXTRA_DIST += bench/floors.c bench/floors-kernels.cu bench/floors.h bench/loading.c bench/results/floors-h200.csv \
	bench/results/clocks-h200.csv
if HAVE_CUDA
noinst_LTLIBRARIES += libfqfloors.la
libfqfloors_la_SOURCES = bench/floors-kernels.cu bench/floors.h
check_PROGRAMS += bench/floors bench/loading
bench_floors_SOURCES = bench/floors.c
bench_floors_LDADD = libfqfloors.la $(CUDA_LIBS)
bench_loading_SOURCES = bench/loading.c
bench_loading_LDADD = $(KERNEL_LIBS)
endif
EXTRA_DIST += bench/h200.sh bench/plot-kernels.py bench/summary.py bench/kernels-cpu.svg \
	bench/kernels-h200.svg bench/results/model-h200.csv bench/results/loading-h200.csv
EXTRA_DIST += bench/results/kernels-h200.csv bench/results/counters-h200.csv bench/results/compute-sanitizer-h200.txt \
	bench/results/kernels-cpu.csv bench/results/kernels-cpu-avx512.csv \
	bench/results/kernels-cpu-avx2.csv bench/results/kernels-cpu-avxvnni.csv bench/results/kernels-cpu-zen3.csv bench/results/kernels-cpu-sapphire-rapids.csv bench/results/kernels-cpu-amx.csv \
	bench/results/kernels-cpu-emerald-rapids.csv bench/results/kernels-cpu-amx-emerald-rapids.csv \
	bench/results/gpu-tests-h200.txt bench/results/malformed-frames.txt \
	bench/results/fuzz.txt bench/results/round-trips.txt bench/results/vllm.txt
# What the quantizer's choices are worth, and how fast it is.
EXTRA_DIST += bench/quantizer-evidence.py bench/quantizer-rate.py \
	bench/results/quantizer-minilm.csv bench/results/quantizer-minilm-matrices.csv \
	bench/results/quantizer-minilm-equal-bytes.csv bench/results/quantizer-minilm-alpha.csv \
	bench/results/quantizer-outliers.csv \
	bench/results/quantizer-outliers-equal-bytes.csv bench/results/quantizer-rate.csv \
	bench/results/quantizer-minilm.svg
