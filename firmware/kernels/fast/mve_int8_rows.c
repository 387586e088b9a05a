// mve_int8_rows.c: rows times a matrix with vectors: sixteen products by one instruction.
//
// Four channels meet all rows of x, one by one: their sums are a vector, and so their outputs.
// Where a row is no multiple of sixteen bytes its last sixteen are taken once more, and of x those
// are cleared that have been there before.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_scale.h" // outputs
#include "kernels/int8_rows.h"

// Sixteen bytes; p moves on behind them. GCC would keep p, and add it up anew for every load.
#define BYTES_TAKE(v, p)                                                                           \
    __asm__ volatile("vldrb.8 %q[to], [%[at]], #16"                                                \
                     : [to] "=w"(v), [at] "+r"(p)                                                  \
                     : "m"(*(const int8_t(*)[16])(p)))

// All ones where the last sixteen bytes of a row have not been there before.
static int8x16_t fresh(size_t size) {
    const int8x16_t lane = vreinterpretq_s8_u8(vidupq_n_u8(0, 1));
    const int8_t back = (int8_t)(16 - size % 16);
    return vpselq_s8(vdupq_n_s8(-1), vdupq_n_s8(0), vcmpgeq_n_s8(lane, back));
}

// Four channels: their weights and biases, and the last one again where there is none.
struct channels {
    const int8_t *w0, *w1, *w2, *w3;
    int32_t b0, b1, b2, b3;
};

static struct channels channels_at(const struct int8_matrix *m, size_t first) {
    const size_t last = m->channels - 1;
    const size_t second = first + 1 < last ? first + 1 : last;
    const size_t third = first + 2 < last ? first + 2 : last;
    const size_t fourth = first + 3 < last ? first + 3 : last;
    return (struct channels){
        m->w + first * m->size,
        m->w + second * m->size,
        m->w + third * m->size,
        m->w + fourth * m->size,
        m->b[first],
        m->b[second],
        m->b[third],
        m->b[fourth],
    };
}

// The biases plus the products of x with the weights.
static inline int32x4_t meet(struct channels c, const int8_t *x, size_t size, int8x16_t last) {
    int8x16_t v, g;
    if (size < 16) {
        const mve_pred16_t there = vctp8q(size);
        v = vldrbq_z_s8(x, there);
        c.b0 = vmladavaq_s8(c.b0, v, vldrbq_z_s8(c.w0, there));
        c.b1 = vmladavaq_s8(c.b1, v, vldrbq_z_s8(c.w1, there));
        c.b2 = vmladavaq_s8(c.b2, v, vldrbq_z_s8(c.w2, there));
        c.b3 = vmladavaq_s8(c.b3, v, vldrbq_z_s8(c.w3, there));
    } else {
        for (size_t i = size / 16; i > 0; i--) {
            BYTES_TAKE(v, x);
            BYTES_TAKE(g, c.w0);
            c.b0 = vmladavaq_s8(c.b0, v, g);
            BYTES_TAKE(g, c.w1);
            c.b1 = vmladavaq_s8(c.b1, v, g);
            BYTES_TAKE(g, c.w2);
            c.b2 = vmladavaq_s8(c.b2, v, g);
            BYTES_TAKE(g, c.w3);
            c.b3 = vmladavaq_s8(c.b3, v, g);
        }
        if (size % 16 > 0) {
            const size_t back = 16 - size % 16;
            v = vandq_s8(vldrbq_s8(x - back), last);
            c.b0 = vmladavaq_s8(c.b0, v, vldrbq_s8(c.w0 - back));
            c.b1 = vmladavaq_s8(c.b1, v, vldrbq_s8(c.w1 - back));
            c.b2 = vmladavaq_s8(c.b2, v, vldrbq_s8(c.w2 - back));
            c.b3 = vmladavaq_s8(c.b3, v, vldrbq_s8(c.w3 - back));
        }
    }
    const int32x4_t sums = {c.b0, c.b1, c.b2, c.b3};
    return sums;
}

void int8_rows(int8_t *y, size_t pitch, const int8_t *x, size_t rows, const struct int8_matrix *m) {
    const size_t size = m->size;
    const int8x16_t last = fresh(size);
    const struct int8_output to = m->to; // which y cannot change
    for (size_t first = 0; first < m->channels; first += 4) {
        const struct channels c = channels_at(m, first);
        const mve_pred16_t there = vctp32q(m->channels - first);
        const struct mve_factor f = mve_factor(&to, first, m->step, there);
        const int8_t *seen = x;
        int8_t *put = y + first;
        for (size_t row = rows; row > 0; row--, seen += size, put += pitch) {
            vstrbq_p_s32(put, mve_put(meet(c, seen, size, last), f, &to), there);
        }
    }
}

#endif // INT8_MVE
