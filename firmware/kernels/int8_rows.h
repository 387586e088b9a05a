// int8_rows.h: rows of bytes times a matrix of weights: what convolutions and linear layers come
// down to. A pixel sees one row of x and makes one row of y.
#ifndef INT8_ROWS_H
#define INT8_ROWS_H

#include "kernels/int8.h"

struct int8_matrix {
    const int8_t *w;       // channels x size
    const int32_t *b;      // channels
    size_t size, channels; // of a row of x, of a row of y
    struct int8_output to; // its first multiplier is the first channel's
    size_t step;           // multipliers from a channel to the next; 0: there is one for all
};

// y[row][channel] = b[channel] + the sum of w[channel][i] * x[row][i], as output. x is rows x size;
// a row of y begins `pitch` bytes behind the last one.
void int8_rows(int8_t *y, size_t pitch, const int8_t *x, size_t rows, const struct int8_matrix *m);

#endif
