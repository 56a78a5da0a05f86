# SPDX-License-Identifier: Apache-2.0
# Scripts of the test suite.  C tests stand beside what they test, in each folder's local.mk.
TEST_EXTENSIONS = .sh .py
SH_LOG_COMPILER = $(SHELL)
# Without a Python that has numpy and msgpack, Python tests skip.
PY_LOG_COMPILER = $(SHELL) $(top_srcdir)/tests/run-python
AM_TESTS_ENVIRONMENT = \
	top_builddir='$(abs_top_builddir)'; export top_builddir; \
	top_srcdir='$(abs_top_srcdir)'; export top_srcdir; \
	srcdir='$(abs_srcdir)'; export srcdir; \
	PYTHON3='$(PYTHON3)'; export PYTHON3; \
	PYTHONDONTWRITEBYTECODE=1; export PYTHONDONTWRITEBYTECODE; \
	MANDOC='$(MANDOC)'; export MANDOC; \
	ASAN_OPTIONS=detect_leaks=1:abort_on_error=0:exitcode=99; export ASAN_OPTIONS; \
	OMP_NUM_THREADS=2; export OMP_NUM_THREADS;
dist_check_SCRIPTS += tests/check-includes.sh tests/check-manuals.sh
TESTS += tests/check-includes.sh tests/check-manuals.sh
EXTRA_DIST += tests/run-python tests/quickstart/minilm.py .ci/run
# GPU tests: staged here, run on a machine with a GPU.
EXTRA_DIST += tests/gpu/stage.sh tests/gpu/run.sh tests/gpu/device-buffers.py

INTEGRATION_TESTS = tests/integration/serve.py tests/integration/refusals.py \
	tests/integration/quotas.py tests/integration/lifecycle.py tests/integration/crashes.py \
	tests/integration/onecopy.py tests/integration/permissions.py \
	tests/integration/malformed.py tests/integration/wire-client.py \
	tests/integration/ctl.py tests/integration/library.py tests/integration/checkpoint-formats.py
dist_check_SCRIPTS += $(INTEGRATION_TESTS)
TESTS += $(INTEGRATION_TESTS)
EXTRA_DIST += tests/integration/harness.py
if SANITIZERS
AM_TESTS_ENVIRONMENT += FINEQUANT_TEST_SANITIZED=1; export FINEQUANT_TEST_SANITIZED;
endif
# A client from PROTOCOL.md alone; the integration tests run it against a daemon.
EXTRA_DIST += tests/python/wire.py
# Reference packings of every format, in numpy.
EXTRA_DIST += tests/python/formats.py
