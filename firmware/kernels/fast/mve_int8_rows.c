// mve_int8_rows.c: rows times a matrix with vectors: sixteen products by one instruction.
//
// Four rows meet two channels (mve_int8_quads.c). What that leaves, rows or a channel, is done
// here: four channels meet a row, their sums are a vector, and so are their outputs.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_quads.h" // four rows at a time
#include "kernels/fast/mve_int8_scale.h" // outputs

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

// The biases plus the products of x with the weights. Assembly, because GCC 12 has no words for a
// loop whose lanes behind the end are 0.
static inline int32x4_t meet(struct channels c, const int8_t *x, size_t size) {
    __asm__ volatile(
        "wlstp.8 lr, %[size], 2f\n\t"
        "1: vldrb.8 q0, [%[x]], #16\n\t"
        "vldrb.8 q1, [%[w0]], #16\n\t"
        "vldrb.8 q2, [%[w1]], #16\n\t"
        "vmladava.s8 %[b0], q0, q1\n\t"
        "vldrb.8 q3, [%[w2]], #16\n\t"
        "vmladava.s8 %[b1], q0, q2\n\t"
        "vldrb.8 q1, [%[w3]], #16\n\t"
        "vmladava.s8 %[b2], q0, q3\n\t"
        "vmladava.s8 %[b3], q0, q1\n\t"
        "letp lr, 1b\n\t"
        "2:"
        : [x] "+r"(x), [w0] "+r"(c.w0), [w1] "+r"(c.w1), [w2] "+r"(c.w2), [w3] "+r"(c.w3),
          [b0] "+Te"(c.b0), [b1] "+Te"(c.b1), [b2] "+Te"(c.b2), [b3] "+Te"(c.b3)
        : [size] "r"(size)
        : "q0", "q1", "q2", "q3", "lr", "memory");
    const int32x4_t sums = {c.b0, c.b1, c.b2, c.b3};
    return sums;
}

// The channels from `first` on, of each row.
static void row_by_row(int8_t *y, size_t pitch, const int8_t *x, size_t rows, size_t first,
                       const struct int8_matrix *m) {
    const size_t size = m->size;
    const struct int8_output to = m->to; // which y cannot change
    for (; first < m->channels; first += 4) {
        const struct channels c = channels_at(m, first);
        const mve_pred16_t there = vctp32q(m->channels - first);
        const struct mve_factor f = mve_factor(&to, first, m->step, there);
        const int8_t *seen = x;
        int8_t *put = y + first;
        for (size_t row = rows; row > 0; row--, seen += size, put += pitch) {
            vstrbq_p_s32(put, mve_put(meet(c, seen, size), f, &to), there);
        }
    }
}

// Whether all shifts are below 0.
static int all_shrink(const struct int8_matrix *m) {
    const size_t count = m->step > 0 ? m->channels : 1;
    int8_t most = -1;
    for (size_t i = 0; i < count; i += 16) {
        const mve_pred16_t there = vctp8q(count - i);
        most = vmaxvq_p_s8(most, vldrbq_z_s8(m->to.shift + i, there), there);
    }
    return most < 0;
}

void int8_rows(int8_t *y, size_t pitch, const int8_t *x, size_t rows, const struct int8_matrix *m) {
    const size_t most = rows / 4 * 4;
    if (most > 0 && all_shrink(m)) {
        mve_int8_quads(y, pitch, x, most / 4, m);
        if (m->channels % 2 > 0) {
            row_by_row(y, pitch, x, most, m->channels - 1, m);
        }
        y += most * pitch;
        x += most * m->size;
        rows -= most;
    }
    if (rows > 0) {
        row_by_row(y, pitch, x, rows, 0, m);
    }
}

#endif // INT8_MVE
