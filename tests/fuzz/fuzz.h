/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the checkpoint fuzzers share.  An input is text, so that mutations stay
 * meaningful: sections that each end with a NUL,
 *     the quantization_config, without its quant_method;
 *     the index, or nothing for a single file;
 *     a line "name dtype size size ..." for each tensor, "--" before the second shard's;
 * and then the tensors' bytes, repeated as far as they are needed.  From it two
 * files with valid offsets are made, so that what is fuzzed lies behind the
 * safetensors reader, which has a fuzzer of its own.
 */
#ifndef FQ_FUZZ_H
#define FQ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* How many inputs were accepted: what run-seeds.c holds whole seeds to. */
extern size_t fuzz_accepted;

struct fq_memory_file;

/* Opens the files, loads every matrix and bias, and touches all of it. */
void fuzz_checkpoint(const struct fq_memory_file *files, size_t count);

/* Makes the files of an input for quant_method METHOD and opens them. */
void fuzz_layout(const uint8_t *data, size_t size, const char *method);

#endif
