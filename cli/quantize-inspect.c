/* SPDX-License-Identifier: Apache-2.0 */
/* finequant-quantize inspect DIR: a table of the linear layers of a checkpoint. */
#include "quantize-cli.h"

#include "checkpoint.h"

#include <inttypes.h>

static const struct quantize_option options[] = {
    {0},
};

static int run(char **arguments, struct fq_error *err) {
    struct fq_checkpoint *checkpoint;
    int rc = fq_checkpoint_new(arguments[0], &checkpoint, err);

    if (rc < 0)
        return rc;
    for (size_t i = 0; i < fq_checkpoint_matrix_count(checkpoint); i++) {
        const struct fq_checkpoint_matrix *matrix = fq_checkpoint_matrix(checkpoint, i);

        printf("%s %" PRId64 "x%" PRId64 ", %d bits, group %" PRId64 ", %" PRIu64 " bytes\n",
               matrix->name, matrix->matrix.n, matrix->matrix.k, matrix->matrix.bits,
               matrix->matrix.group, matrix->stored);
    }
    fq_checkpoint_free(checkpoint);
    return 0;
}

const struct quantize_command quantize_inspect = {
    .name = "inspect",
    .arguments = "DIR",
    .argument_count = 1,
    .help = "Print a table of the linear layers of the checkpoint in the directory DIR",
    .options = options,
    .run = run,
};
