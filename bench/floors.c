/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Prints what the arithmetic of Hopper's decode kernels takes by itself, as CSV: cycles that a
 * multiprocessor needs for a tile of a strip of W, 64 by 64, of the tensor cores' products alone
 * and of all (floors.h), in the order that the kernels have them in.
 *
 *     floors
 */
#include "floors.h"

#include <stdio.h>

int main(void) {
    static const int all_bits[] = {8, 4, 3}, all_rows[] = {8, 16, 32, 64};

    printf("bits,dtype,rows,products,all\n");
    for (int i = 0; i < 3 * 2 * 4; i++) {
        struct fq_floor floor = {
            .bits = all_bits[i / 8], .bf16 = i / 4 % 2, .rows = all_rows[i % 4]};

        printf("%d,%s,%d", floor.bits, floor.bf16 ? "bf16" : "f16", floor.rows);
        for (int part = 0; part < 2; part++) {
            const char *error;
            double cycles;

            floor.products_only = part == 0;
            if (fq_floor_measure(&floor, &cycles, &error)) {
                fprintf(stderr, "floors: cannot measure %d bits, %d rows: %s\n", floor.bits,
                        floor.rows, error);
                return 1;
            }
            printf(",%.1f", cycles);
        }
        printf("\n");
    }
    return 0;
}
