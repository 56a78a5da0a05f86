# SPDX-License-Identifier: Apache-2.0
noinst_LTLIBRARIES += libfqmodel.la
libfqmodel_la_SOURCES = model/checkpoint.c model/checkpoint.h model/compressed-tensors.c \
	model/compressed-tensors.h model/compressed-tensors-config.c model/directory.c \
	model/directory.h model/output-directory.c model/output-directory.h model/quantize-checkpoint.c \
	model/quantize-checkpoint.h model/quantize.c model/quantize.h model/safetensors.c \
	model/safetensors.h model/safetensors-writer.c
libfqmodel_la_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS) $(PCRE2_CFLAGS)
libfqmodel_la_CFLAGS = $(AM_CFLAGS) $(OPENMP_CFLAGS)
libfqmodel_la_LIBADD = libfqkernels.la libfqbase.la $(JANSSON_LIBS) $(PCRE2_LIBS)
# What a program that reads checkpoints links.
MODEL_LIBS = libfqmodel.la $(OPENMP_CFLAGS)
