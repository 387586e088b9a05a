// int8_rows.c: rows times a matrix, in plain C.
#include "kernels/int8_rows.h"

#include "kernels/int8_simd.h" // whether there is something faster

#if !INT8_DSP && !INT8_MVE

#include "kernels/int8_scale.h" // outputs

void int8_rows(int8_t *y, size_t pitch, const int8_t *x, size_t rows, const struct int8_matrix *m) {
    for (; rows > 0; rows--, x += m->size, y += pitch) {
        const int8_t *w = m->w;
        for (size_t channel = 0; channel < m->channels; channel++) {
            int32_t sum = m->b[channel];
            for (size_t i = 0; i < m->size; i++) {
                sum += *w++ * x[i];
            }
            y[channel] = int8_put(sum, int8_factor_of(&m->to, channel * m->step), m->to);
        }
    }
}

#endif
