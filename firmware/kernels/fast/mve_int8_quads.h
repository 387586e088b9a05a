// mve_int8_quads.h: rows times a matrix with vectors, four rows and two channels at a time.
#ifndef MVE_INT8_QUADS_H
#define MVE_INT8_QUADS_H

#include "kernels/int8_rows.h"

// int8_rows of 4 * quads rows, where all shifts are below 0. Of an odd number of channels the last
// one is left to the caller.
void mve_int8_quads(int8_t *y, size_t pitch, const int8_t *x, size_t quads,
                    const struct int8_matrix *m);

#endif
