# SPDX-License-Identifier: Apache-2.0

bin_PROGRAMS += finequant-quantize
finequant_quantize_SOURCES = cli/quantize.c
finequant_quantize_CPPFLAGS = $(AM_CPPFLAGS) $(JANSSON_CFLAGS)
finequant_quantize_LDADD = $(MODEL_LIBS) $(JANSSON_LIBS)
