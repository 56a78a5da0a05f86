# SPDX-License-Identifier: Apache-2.0
noinst_LTLIBRARIES += libfqmodel.la
libfqmodel_la_SOURCES = model/awq.c model/checkpoint.c model/checkpoint.h \
	model/checkpoint-writer.c model/checkpoint-writer.h model/compressed-tensors.c \
	model/compressed-tensors.h model/compressed-tensors-config.c model/compressed-tensors-output.c \
	model/compressed-tensors-output.h model/convert-checkpoint.c model/convert-checkpoint.h \
	model/directory.c model/directory.h model/gguf.c model/gguf.h model/gguf-blocks.c \
	model/gguf-metadata.c model/gguf-reader.h \
	model/gptq.c model/disk-layout.c model/disk-layout.h model/output-directory.c \
	model/output-directory.h model/pattern.c model/pattern.h model/quantize-checkpoint.c \
	model/quantize-checkpoint.h model/quantize-choose.c model/quantize-choose.h \
	model/quantize-decide.c model/quantize-decide.h model/quantize-decide-alpha.c \
	model/quantize-decide-budget.c model/quantize-plan.c model/quantize-plan.h \
	model/quantize.c model/quantize.h model/quantize-kernel.h \
	model/quantize-measure.c model/quantize-row.c model/quantize-row.h model/safetensors.c \
	model/safetensors.h model/safetensors-writer.c model/shards.c model/shards.h
libfqmodel_la_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS) $(PCRE2_CFLAGS)
libfqmodel_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS)
libfqmodel_la_LIBADD = libfqkernels.la libfqbase.la $(JANSSON_LIBS) $(PCRE2_LIBS) \
	libfqquantize_generic.la
# The quantizer's inner loops, once an instruction set.  No contraction: all sets agree bit for bit.
QUANTIZE_CFLAGS = $(AM_CFLAGS) -ffp-contract=off -fno-math-errno -fno-trapping-math
noinst_LTLIBRARIES += libfqquantize_generic.la
libfqquantize_generic_la_SOURCES = model/quantize-kernel.c
libfqquantize_generic_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_QUANTIZE_ISA=generic
libfqquantize_generic_la_CFLAGS = $(QUANTIZE_CFLAGS)
if CPU_X86
noinst_LTLIBRARIES += libfqquantize_avx2.la libfqquantize_avx512.la
libfqmodel_la_LIBADD += libfqquantize_avx2.la libfqquantize_avx512.la
libfqquantize_avx2_la_SOURCES = model/quantize-kernel.c
libfqquantize_avx2_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_QUANTIZE_ISA=avx2
libfqquantize_avx2_la_CFLAGS = $(QUANTIZE_CFLAGS) -mavx2
libfqquantize_avx512_la_SOURCES = model/quantize-kernel.c
libfqquantize_avx512_la_CPPFLAGS = $(AM_CPPFLAGS) -DFQ_QUANTIZE_ISA=avx512
libfqquantize_avx512_la_CFLAGS = $(QUANTIZE_CFLAGS) -mavx512f -mavx512bw -mavx512vl -mavx512dq \
	-mprefer-vector-width=512
endif
# What a program that reads checkpoints links.
MODEL_LIBS = libfqmodel.la $(OPENMP_CFLAGS)

if HAVE_CMOCKA
MODEL_TESTS = model/test-safetensors model/test-quantize model/test-quantize-choose \
	model/test-checkpoint model/test-gguf
check_PROGRAMS += $(MODEL_TESTS)
TESTS += $(MODEL_TESTS)
model_test_safetensors_SOURCES = model/test-safetensors.c
model_test_safetensors_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS) $(JANSSON_CFLAGS)
model_test_safetensors_LDADD = $(MODEL_LIBS) $(CMOCKA_LIBS)
model_test_quantize_SOURCES = model/test-quantize.c
model_test_quantize_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
model_test_quantize_LDADD = $(MODEL_LIBS) $(CMOCKA_LIBS)
model_test_quantize_choose_SOURCES = model/test-quantize-choose.c
model_test_quantize_choose_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
model_test_quantize_choose_LDADD = $(MODEL_LIBS) $(CMOCKA_LIBS)
model_test_checkpoint_SOURCES = model/test-checkpoint.c
model_test_checkpoint_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS) $(JANSSON_CFLAGS)
model_test_checkpoint_LDADD = $(MODEL_LIBS) $(CMOCKA_LIBS)
model_test_gguf_SOURCES = model/test-gguf.c
model_test_gguf_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
model_test_gguf_LDADD = $(MODEL_LIBS) $(CMOCKA_LIBS)
endif
CHECKPOINT_TESTS = tests/python/test-quantize.py tests/python/test-quantize-plan.py \
	tests/python/test-quantize-rules.py tests/python/test-quantize-report.py \
	tests/python/test-quantize-resume.py tests/python/test-convert.py \
	tests/python/test-malformed.py \
	tests/python/test-compressed-tensors.py tests/python/test-gguf.py \
	tests/python/test-vllm.py
dist_check_SCRIPTS += $(CHECKPOINT_TESTS)
EXTRA_DIST += tests/python/checkpoint.py
TESTS += $(CHECKPOINT_TESTS)
