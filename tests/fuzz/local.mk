# SPDX-License-Identifier: Apache-2.0
# The fuzzers: each a program that runs its seeds in every build, and `make fuzz` builds them all
# with libFuzzer, as tests/fuzz/README says.
FUZZERS = fuzz-message fuzz-safetensors fuzz-compressed-tensors fuzz-gptq fuzz-awq fuzz-gguf
fuzz_input_sources = tests/fuzz/fuzz-checkpoint-input.c tests/fuzz/fuzz.h

check_PROGRAMS += tests/fuzz/seeds-message tests/fuzz/seeds-safetensors \
	tests/fuzz/seeds-compressed-tensors tests/fuzz/seeds-gptq tests/fuzz/seeds-awq \
	tests/fuzz/seeds-gguf
tests_fuzz_seeds_message_SOURCES = tests/fuzz/fuzz-message.c tests/fuzz/run-seeds.c tests/fuzz/fuzz.h
tests_fuzz_seeds_message_LDADD = libfqproto.la libfqbase.la
tests_fuzz_seeds_safetensors_SOURCES = tests/fuzz/fuzz-safetensors.c tests/fuzz/run-seeds.c tests/fuzz/fuzz.h
tests_fuzz_seeds_safetensors_LDADD = $(MODEL_LIBS)
tests_fuzz_seeds_compressed_tensors_SOURCES = tests/fuzz/fuzz-compressed-tensors.c tests/fuzz/run-seeds.c $(fuzz_input_sources)
tests_fuzz_seeds_compressed_tensors_LDADD = $(MODEL_LIBS)
tests_fuzz_seeds_gptq_SOURCES = tests/fuzz/fuzz-gptq.c tests/fuzz/run-seeds.c $(fuzz_input_sources)
tests_fuzz_seeds_gptq_LDADD = $(MODEL_LIBS)
tests_fuzz_seeds_awq_SOURCES = tests/fuzz/fuzz-awq.c tests/fuzz/run-seeds.c $(fuzz_input_sources)
tests_fuzz_seeds_awq_LDADD = $(MODEL_LIBS)
tests_fuzz_seeds_gguf_SOURCES = tests/fuzz/fuzz-gguf.c tests/fuzz/run-seeds.c $(fuzz_input_sources)
tests_fuzz_seeds_gguf_LDADD = $(MODEL_LIBS)
dist_check_SCRIPTS += tests/fuzz/test-seeds.sh
TESTS += tests/fuzz/test-seeds.sh
EXTRA_DIST += tests/fuzz/README tests/fuzz/make-seeds.py tests/fuzz/seeds

FUZZ_CC = clang
FUZZ_CFLAGS = -std=gnu11 -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined \
	-fno-sanitize-recover=undefined
fuzz_includes = -D_GNU_SOURCE -Ibase -Ikernels -Iproto -Imodel -Itests/fuzz $(JANSSON_CFLAGS) \
	$(PCRE2_CFLAGS) $(MSGPACK_CFLAGS) -DFQ_QUANTIZE_ISA=generic
fuzz_sources = $(filter %.c,$(libfqmodel_la_SOURCES) $(libfqbase_la_SOURCES)) kernels/matrix.c \
	$(libfqquantize_generic_la_SOURCES) proto/message.c tests/fuzz/fuzz-checkpoint-input.c
fuzz_libraries = $(JANSSON_LIBS) $(PCRE2_LIBS) $(MSGPACK_LIBS) -lm
CLEANFILES += $(FUZZERS) fuzz-objects.a
.PHONY: fuzz
fuzz:
	rm -rf fuzz-objects fuzz-objects.a && mkdir fuzz-objects
	cd $(srcdir) && for source in $(fuzz_sources); do \
	    $(FUZZ_CC) $(FUZZ_CFLAGS) -fsanitize=fuzzer-no-link $(fuzz_includes) -c $$source \
	        -o $(abs_builddir)/fuzz-objects/$$(basename $$source .c).o || exit 1; \
	done
	$(AR) rcs fuzz-objects.a fuzz-objects/*.o && rm -rf fuzz-objects
	cd $(srcdir) && for fuzzer in $(FUZZERS); do \
	    $(FUZZ_CC) $(FUZZ_CFLAGS) -fsanitize=fuzzer $(fuzz_includes) tests/fuzz/$$fuzzer.c \
	        $(abs_builddir)/fuzz-objects.a $(fuzz_libraries) -o $(abs_builddir)/$$fuzzer || exit 1; \
	done
