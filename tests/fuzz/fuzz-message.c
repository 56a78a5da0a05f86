/* SPDX-License-Identifier: Apache-2.0 */
/* libFuzzer's entry to the wire's codec: an input is a frame's payload. */
#include "message.h"

#include "fuzz.h"

size_t fuzz_accepted;

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct fq_message message;
    unsigned fds;

    if (fq_message_parse(data, size, &message, NULL) == 0) {
        fq_message_fds(&message, &fds, NULL);
        fq_message_fini(&message);
        fuzz_accepted++;
    }
    return 0;
}
