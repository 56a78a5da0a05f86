/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer's entry to GGUF: an input is a file. */
#include "checkpoint.h"
#include "fuzz.h"

size_t fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const struct fq_memory_file file = {"fuzz.gguf", data, size};

    fuzz_checkpoint(&file, 1);
    return 0;
}
