# SPDX-License-Identifier: Apache-2.0
noinst_LTLIBRARIES += libfqproto.la
libfqproto_la_SOURCES = proto/socket-path.c proto/socket-path.h
EXTRA_DIST += proto/PROTOCOL.md
