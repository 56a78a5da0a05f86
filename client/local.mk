# SPDX-License-Identifier: Apache-2.0
# libfinequant: the C ABI. Only what the symbol map lists is exported.
lib_LTLIBRARIES += libfinequant.la
include_HEADERS += client/finequant.h
libfinequant_la_SOURCES = client/finequant.h client/client.c client/client.h \
	client/connection.c client/connection.h client/call.c client/deadline.h client/buffer.c \
	client/json.c client/device.c client/device.h
libfinequant_la_CPPFLAGS = $(AM_CPPFLAGS) $(MSGPACK_CFLAGS) $(JANSSON_CFLAGS)
libfinequant_la_CFLAGS = $(AM_CFLAGS) -pthread
libfinequant_la_LDFLAGS = $(AM_LDFLAGS) -version-info 0:0:0 -pthread
if HAVE_VERSION_SCRIPT
libfinequant_la_LDFLAGS += -Wl,--version-script=$(top_srcdir)/client/finequant.map
endif
libfinequant_la_DEPENDENCIES = libfqproto.la client/finequant.map
libfinequant_la_LIBADD = libfqproto.la $(MSGPACK_LIBS) $(JANSSON_LIBS)
pkgconfig_DATA += client/finequant.pc
EXTRA_DIST += client/finequant.map client/python/finequant.py
if HAVE_CMOCKA
check_PROGRAMS += client/test-client
TESTS += client/test-client
client_test_client_SOURCES = client/test-client.c
client_test_client_CPPFLAGS = $(AM_CPPFLAGS) $(MSGPACK_CFLAGS) $(CMOCKA_CFLAGS)
client_test_client_CFLAGS = $(AM_CFLAGS) -pthread
client_test_client_LDFLAGS = $(AM_LDFLAGS) -pthread
client_test_client_LDADD = libfinequant.la libfqproto.la $(MSGPACK_LIBS) $(CMOCKA_LIBS)
endif
