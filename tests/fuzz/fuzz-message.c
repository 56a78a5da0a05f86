/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libFuzzer's entry to the codec.  By hand:
 *     clang -g -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -Ibase -Iproto \
 *         tests/fuzz/fuzz-message.c proto/message.c base/error.c base/types.c -lmsgpackc
 */
#include "message.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t length) {
    struct fq_message message;
    unsigned fds;

    if (fq_message_parse(bytes, length, &message, NULL) == 0) {
        fq_message_fds(&message, &fds, NULL);
        fq_message_fini(&message);
    }
    return 0;
}
