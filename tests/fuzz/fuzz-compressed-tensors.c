/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer's entry to compressed-tensors configs, indices and tensors; fuzz.h says what an input
 * is. */
#include "fuzz.h"

size_t fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_layout(data, size, "compressed-tensors");
    return 0;
}
