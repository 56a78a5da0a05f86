# SPDX-License-Identifier: Apache-2.0
# libfqkernels: the interface, and behind it one library an instruction set.
noinst_LTLIBRARIES += libfqkernels.la libfqcpu_generic.la
libfqkernels_la_SOURCES = kernels/backend.c kernels/backend.h kernels/backend-impl.h \
	kernels/matrix.c kernels/matrix.h kernels/synthetic.c kernels/synthetic.h kernels/host.c \
	kernels/reference/reference.c \
	kernels/cpu/cpu.c kernels/cpu/cpu.h kernels/cpu/pack.c kernels/cpu/epilogue.c
libfqkernels_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS)
libfqkernels_la_LIBADD = libfqbase.la libfqcpu_generic.la
libfqcpu_generic_la_SOURCES = kernels/cpu/kernels.c
libfqcpu_generic_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_CPU_ISA=generic
libfqcpu_generic_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS) -Wno-psabi
if CPU_X86
noinst_LTLIBRARIES += libfqcpu_avx2.la libfqcpu_avx2_float.la libfqcpu_avx512.la \
	libfqcpu_avx512vnni.la libfqcpu_avx512gfni.la libfqcpu_avx512bf16.la
libfqkernels_la_LIBADD += libfqcpu_avx2.la libfqcpu_avx2_float.la libfqcpu_avx512bf16.la \
	libfqcpu_avx512gfni.la libfqcpu_avx512vnni.la libfqcpu_avx512.la
libfqcpu_avx2_la_SOURCES = kernels/cpu/words.c kernels/cpu/words-fixed.c kernels/cpu/fixed-decode.h \
	kernels/cpu/block.h kernels/cpu/fixed.h kernels/cpu/avx2.h kernels/cpu/fixed-avx2.h
libfqcpu_avx2_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS) -mavx2 -mfma -mf16c
libfqcpu_avx2_float_la_SOURCES = kernels/cpu/kernels.c
libfqcpu_avx2_float_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_CPU_ISA=avx2_float
libfqcpu_avx2_float_la_CFLAGS = $(libfqcpu_avx2_la_CFLAGS)
libfqcpu_avx512_la_SOURCES = kernels/cpu/kernels.c
libfqcpu_avx512_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_CPU_ISA=avx512
libfqcpu_avx512_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS) -mavx512f -mavx512bw \
	-mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512
libfqcpu_avx512vnni_la_SOURCES = kernels/cpu/dot.c kernels/cpu/dot.h kernels/cpu/fixed.c \
	kernels/cpu/fixed-decode.h kernels/cpu/block.h kernels/cpu/fixed.h
libfqcpu_avx512vnni_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS) -mavx512f -mavx512bw \
	-mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mprefer-vector-width=512
libfqcpu_avx512gfni_la_SOURCES = kernels/cpu/dot.c
libfqcpu_avx512gfni_la_CFLAGS = $(libfqcpu_avx512vnni_la_CFLAGS) -mgfni
libfqcpu_avx512bf16_la_SOURCES = kernels/cpu/bf16.c
libfqcpu_avx512bf16_la_CFLAGS = $(libfqcpu_avx512vnni_la_CFLAGS) -mavx512bf16
endif
if CPU_AVXVNNI
noinst_LTLIBRARIES += libfqcpu_avxvnni.la
libfqkernels_la_LIBADD += libfqcpu_avxvnni.la
libfqcpu_avxvnni_la_SOURCES = kernels/cpu/bytes.c kernels/cpu/bytes-fixed.c
libfqcpu_avxvnni_la_CFLAGS = $(libfqcpu_avx2_la_CFLAGS)
endif
if CPU_AMX
noinst_LTLIBRARIES += libfqcpu_amx.la
libfqkernels_la_LIBADD += libfqcpu_amx.la
libfqcpu_amx_la_SOURCES = kernels/cpu/amx.c kernels/cpu/dot.h kernels/cpu/block.h
libfqcpu_amx_la_CFLAGS = $(libfqcpu_avx512gfni_la_CFLAGS)
endif
# The CUDA sources go into every tarball, whether or not this build compiles them.
EXTRA_DIST += kernels/cuda/NOTES.md
CUDA_SOURCES = kernels/cuda/backend.c kernels/cuda/memory.c kernels/cuda/slab.c \
	kernels/cuda/weights.c kernels/cuda/gemm.c kernels/cuda/cuda-impl.h kernels/cuda/layout.h \
	kernels/cuda/tiles.h kernels/cuda/shares.h kernels/cuda/plan.c kernels/cuda/plan.h kernels/cuda/ptx.cuh kernels/cuda/ptx-hopper.cuh \
	kernels/cuda/wgmma.cuh kernels/cuda/dequant.cuh kernels/cuda/launch.cuh \
	kernels/cuda/epilogue.cuh kernels/cuda/hopper.cuh kernels/cuda/hopper-decode.cuh \
	kernels/cuda/hopper-decode-cta.cuh kernels/cuda/hopper-decode-produce.cuh \
	kernels/cuda/hopper-decode-store.cuh kernels/cuda/hopper-decode-sum.cuh \
	kernels/cuda/hopper-decode-consume.cuh kernels/cuda/hopper-decode-weights.cuh \
	kernels/cuda/hopper-parts.cuh \
	kernels/cuda/hopper-prefill-cta.cuh kernels/cuda/hopper-prefill-store.cuh \
	kernels/cuda/hopper-prefill.cuh kernels/cuda/gemm.cuh kernels/cuda/decode.cuh \
	kernels/cuda/hopper-decode-int8.cu kernels/cuda/hopper-decode-int4.cu \
	kernels/cuda/hopper-decode-int3.cu kernels/cuda/hopper-prefill-int8.cu \
	kernels/cuda/hopper-prefill-int4.cu kernels/cuda/hopper-prefill-int3.cu \
	kernels/cuda/rows.cu \
	kernels/cuda/decode-int8.cu kernels/cuda/decode-int4.cu kernels/cuda/decode-int3.cu \
	kernels/cuda/prefill.cu kernels/cuda/prepack.cu kernels/cuda/synthetic.cu
if HAVE_CUDA
AM_CPPFLAGS += $(CUDA_CPPFLAGS)
noinst_LTLIBRARIES += libfqcuda.la
libfqcuda_la_SOURCES = $(CUDA_SOURCES)
libfqkernels_la_LIBADD += libfqcuda.la $(CUDA_LIBS)
endif
# What a program that uses the kernels links.
KERNEL_LIBS = libfqkernels.la $(OPENMP_CFLAGS)

if HAVE_CMOCKA
KERNEL_TESTS = kernels/cpu/test-pack kernels/test-matrix kernels/test-backend kernels/test-conformance \
	kernels/test-synthetic kernels/cuda/test-plan
check_PROGRAMS += $(KERNEL_TESTS)
TESTS += $(KERNEL_TESTS)
kernels_cpu_test_pack_SOURCES = kernels/cpu/test-pack.c
kernels_cpu_test_pack_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_cpu_test_pack_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
kernels_cuda_test_plan_SOURCES = kernels/cuda/test-plan.c kernels/cuda/test-sizes.h \
	kernels/cuda/plan.c kernels/cuda/plan.h
kernels_cuda_test_plan_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_cuda_test_plan_LDADD = $(CMOCKA_LIBS)
kernels_test_matrix_SOURCES = kernels/test-matrix.c
kernels_test_matrix_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_test_matrix_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
kernels_test_synthetic_SOURCES = kernels/test-synthetic.c
kernels_test_synthetic_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_test_synthetic_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
kernels_test_backend_SOURCES = kernels/test-backend.c
kernels_test_backend_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_test_backend_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
kernels_test_conformance_SOURCES = kernels/test-conformance.c kernels/test-conformance.h \
	kernels/test-conformance-sizes.c kernels/cuda/test-sizes.h kernels/test-case.c kernels/test-case.h
kernels_test_conformance_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_test_conformance_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
if HAVE_CUDA
check_PROGRAMS += kernels/cuda/test-ipc
TESTS += kernels/cuda/test-ipc
kernels_cuda_test_ipc_SOURCES = kernels/cuda/test-ipc.c
kernels_cuda_test_ipc_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
kernels_cuda_test_ipc_LDADD = $(KERNEL_LIBS) $(CMOCKA_LIBS)
endif
endif
EXTRA_DIST += kernels/cpu/NOTES.md
