/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer's entry to the safetensors reader: an input is a file. */
#include "safetensors.h"

#include "fuzz.h"

size_t fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fq_safetensors *file;
    volatile uint8_t sink = 0;

    if (fq_safetensors_new_memory(data, size, "fuzz", &file, NULL) < 0)
        return 0;
    for (size_t i = 0; i < file->count; i++)
        for (uint64_t at = 0; at < file->tensors[i].bytes; at++)
            sink ^= ((const uint8_t *)file->tensors[i].data)[at];
    fq_safetensors_free(file);
    fuzz_accepted++;
    return 0;
}
