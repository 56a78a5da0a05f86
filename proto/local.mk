# SPDX-License-Identifier: Apache-2.0
# libfqproto: frames, messages and parameters of the wire. The daemon and libfinequant use it.
noinst_LTLIBRARIES += libfqproto.la
libfqproto_la_SOURCES = proto/frame.c proto/frame.h proto/message.c proto/message.h \
	proto/pack.c proto/pack.h proto/params.c proto/params.h \
	proto/socket-path.c proto/socket-path.h
libfqproto_la_CPPFLAGS = $(AM_CPPFLAGS) $(MSGPACK_CFLAGS)
libfqproto_la_LIBADD = libfqbase.la $(MSGPACK_LIBS)
EXTRA_DIST += proto/PROTOCOL.md
