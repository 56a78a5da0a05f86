# SPDX-License-Identifier: Apache-2.0
sbin_PROGRAMS += finequantd
finequantd_SOURCES = daemon/main.c daemon/daemon.h daemon/list.h \
	daemon/settings.c daemon/settings.h daemon/log.c daemon/log.h \
	daemon/listener.c daemon/listener.h daemon/session.c daemon/session.h \
	daemon/methods.c daemon/methods.h daemon/method-gemm.c \
	daemon/account.c daemon/account.h daemon/buffers.c daemon/buffers.h \
	daemon/registry.c daemon/registry.h daemon/state.c daemon/state.h daemon/scheduler.c daemon/scheduler.h \
	daemon/executor.c daemon/executor.h daemon/metrics.c daemon/metrics.h
finequantd_CPPFLAGS = $(AM_CPPFLAGS) $(UV_CFLAGS) $(MSGPACK_CFLAGS) $(INIH_CFLAGS) \
	$(SYSTEMD_CFLAGS)
finequantd_LDADD = $(MODEL_LIBS) libfqproto.la $(KERNEL_LIBS) libfqbase.la \
	$(UV_LIBS) $(MSGPACK_LIBS) $(INIH_LIBS) $(SYSTEMD_LIBS)
dist_man_MANS += man/finequantd.8 man/finequantd.conf.5
dist_doc_DATA = daemon/finequantd.conf.example
EXTRA_DIST += daemon/finequantd.service.in daemon/finequantd@.service.in
if HAVE_SYSTEMD
systemdsystemunit_DATA = daemon/finequantd.service daemon/finequantd@.service
CLEANFILES += $(systemdsystemunit_DATA)
# sed, and not configure: the directories are known to make alone
daemon/finequantd.service daemon/finequantd@.service: daemon/%.service: daemon/%.service.in \
		Makefile
	@$(MKDIR_P) daemon
	$(AM_V_GEN)$(SED) -e 's|@sbindir[@]|$(sbindir)|g' -e 's|@sysconfdir[@]|$(sysconfdir)|g' \
		$(srcdir)/$@.in >$@.tmp && mv $@.tmp $@
endif
if HAVE_CMOCKA
check_PROGRAMS += daemon/test-metrics
TESTS += daemon/test-metrics
daemon_test_metrics_SOURCES = daemon/test-metrics.c daemon/metrics.c
daemon_test_metrics_CPPFLAGS = $(AM_CPPFLAGS) $(CMOCKA_CFLAGS)
daemon_test_metrics_LDADD = $(CMOCKA_LIBS)
endif
