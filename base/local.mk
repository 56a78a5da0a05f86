# SPDX-License-Identifier: Apache-2.0
noinst_LTLIBRARIES += libfqbase.la
libfqbase_la_SOURCES = base/types.c base/error.c base/error.h base/half.h
include_HEADERS += base/finequant-types.h
