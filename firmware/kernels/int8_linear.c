// int8_linear.c: the linear layer in 8 bits.
#include "kernels/int8.h"
#include "kernels/int8_rows.h" // the sums

void int8_linear(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b, size_t in,
                 size_t out, const struct int8_output *to, size_t n) {
    const struct int8_matrix m = {.w = w, .b = b, .size = in, .channels = out, .to = *to};
    int8_rows(y, out, x, n, &m);
}
