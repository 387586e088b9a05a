// dsp_int8_rows.c: rows times a matrix, four products at a time.
//
// Two rows meet two channels: what either has is loaded and unpacked once for both. Where a row is
// no multiple of four bytes its last four are taken once more, and of one factor those are cleared
// that have been there before.
#include "kernels/fast/dsp.h"

#if INT8_DSP

#include "kernels/int8_rows.h"

// ---- one vector meets two others ----

struct two {
    int32_t sum0, sum1;
};

static inline struct two two_step(struct two s, uint32_t p, const int8_t *q0, const int8_t *q1) {
    const int16x2_t even = dsp_even(p), odd = dsp_odd(p);
    const uint32_t g0 = dsp_load(q0), g1 = dsp_load(q1);
    s.sum0 = __smlad(odd, dsp_odd(g0), __smlad(even, dsp_even(g0), s.sum0));
    s.sum1 = __smlad(odd, dsp_odd(g1), __smlad(even, dsp_even(g1), s.sum1));
    return s;
}

// Bits of the bytes that have not been there before, of the last four of a row.
static inline uint32_t fresh(size_t size) {
    return ~0u << 8 * (4 - size % 4);
}

// Adds p * q0 and p * q1, of size bytes each.
static struct two two(struct two s, const int8_t *p, const int8_t *q0, const int8_t *q1,
                      size_t size) {
    if (size < 4) {
        for (size_t i = 0; i < size; i++) {
            s.sum0 += p[i] * q0[i];
            s.sum1 += p[i] * q1[i];
        }
        return s;
    }
    for (const int8_t *const end = p + size / 4 * 4; p < end; p += 4, q0 += 4, q1 += 4) {
        s = two_step(s, dsp_load(p), q0, q1);
    }
    if (size % 4 == 0) {
        return s;
    }
    const size_t back = 4 - size % 4;
    return two_step(s, dsp_load(p - back) & fresh(size), q0 - back, q1 - back);
}

// ---- two vectors meet two others ----

// Sums of row 0, and of row 1, in two channels.
struct four {
    struct two row0, row1;
};

// The second of each lies `size` bytes behind the first. Assembly, because with four pointers, as
// GCC would have it, there are not enough registers.
static struct four four(struct four s, const int8_t *x, const int8_t *w, size_t size) {
    const size_t whole = size / 4 * 4;
    if (whole == 0) {
        return (struct four){two(s.row0, x, w, w + size, size),
                             two(s.row1, x + size, w, w + size, size)};
    }
    const int8_t *const end = x + whole;
    uint32_t even0, odd0, even1, odd1, g_even, g_odd;
    __asm__("1: ldr %[o1], [%[x], %[size]]\n\t"
            "ldr %[o0], [%[x]], #4\n\t"
            "ldr %[go], [%[w], %[size]]\n\t"
            "sxtb16 %[e1], %[o1]\n\t"
            "sxtb16 %[o1], %[o1], ror #8\n\t"
            "sxtb16 %[e0], %[o0]\n\t"
            "sxtb16 %[o0], %[o0], ror #8\n\t"
            "sxtb16 %[ge], %[go]\n\t"
            "sxtb16 %[go], %[go], ror #8\n\t"
            "smlad %[s01], %[e0], %[ge], %[s01]\n\t"
            "smlad %[s11], %[e1], %[ge], %[s11]\n\t"
            "smlad %[s01], %[o0], %[go], %[s01]\n\t"
            "smlad %[s11], %[o1], %[go], %[s11]\n\t"
            "ldr %[go], [%[w]], #4\n\t"
            "cmp %[x], %[end]\n\t"
            "sxtb16 %[ge], %[go]\n\t"
            "sxtb16 %[go], %[go], ror #8\n\t"
            "smlad %[s00], %[e0], %[ge], %[s00]\n\t"
            "smlad %[s10], %[e1], %[ge], %[s10]\n\t"
            "smlad %[s00], %[o0], %[go], %[s00]\n\t"
            "smlad %[s10], %[o1], %[go], %[s10]\n\t"
            "blo 1b"
            : [x] "+r"(x), [w] "+r"(w), [s00] "+r"(s.row0.sum0), [s01] "+r"(s.row0.sum1),
              [s10] "+r"(s.row1.sum0), [s11] "+r"(s.row1.sum1), [e0] "=&r"(even0), [o0] "=&r"(odd0),
              [e1] "=&r"(even1), [o1] "=&r"(odd1), [ge] "=&r"(g_even), [go] "=&r"(g_odd)
            : [size] "r"(size), [end] "r"(end)
            : "cc", "memory");
    if (size > whole) {
        const size_t back = 4 - size % 4;
        x -= back;
        w -= back;
        s.row0 = two_step(s.row0, dsp_load(x) & fresh(size), w, w + size);
        s.row1 = two_step(s.row1, dsp_load(x + size) & fresh(size), w, w + size);
    }
    return s;
}

// ---- rows ----

static void two_rows(int8_t *y, size_t pitch, const int8_t *x, const struct int8_matrix *m) {
    struct int8_output to = m->to;
    const size_t size = m->size, step = m->step;
    const int narrow = dsp_narrow(&to);
    const int8_t *w = m->w;
    const int32_t *b = m->b;
    size_t channels = m->channels;
    for (; channels > 1; channels -= 2, b += 2, w += 2 * size, y += 2) {
        const struct two biases = {b[0], b[1]};
        const struct four s = four((struct four){biases, biases}, x, w, size);
        const struct int8_factor f0 = int8_factor_of(&to, 0);
        y[0] = dsp_put(s.row0.sum0, f0, to, narrow);
        y[pitch] = dsp_put(s.row1.sum0, f0, to, narrow);
        const struct int8_factor f1 = int8_factor_of(&to, step);
        y[1] = dsp_put(s.row0.sum1, f1, to, narrow);
        y[pitch + 1] = dsp_put(s.row1.sum1, f1, to, narrow);
        to.multiplier += 2 * step;
        to.shift += 2 * step;
    }
    if (channels > 0) {
        const struct two s = two((struct two){*b, *b}, w, x, x + size, size);
        const struct int8_factor f = int8_factor_of(&to, 0);
        y[0] = dsp_put(s.sum0, f, to, narrow);
        y[pitch] = dsp_put(s.sum1, f, to, narrow);
    }
}

static void one_row(int8_t *y, const int8_t *x, const struct int8_matrix *m) {
    const struct int8_output to = m->to;
    const int8_t *w = m->w;
    for (size_t channel = 0; channel < m->channels; channel += 2, w += 2 * m->size) {
        // the last channel again where there is no second one
        const size_t other = channel + 1 < m->channels ? channel + 1 : channel;
        const struct two b = {m->b[channel], m->b[other]};
        const struct two s = two(b, x, w, w + (other - channel) * m->size, m->size);
        y[channel] = int8_put(s.sum0, int8_factor_of(&to, channel * m->step), to);
        y[other] = int8_put(s.sum1, int8_factor_of(&to, other * m->step), to);
    }
}

void int8_rows(int8_t *y, size_t pitch, const int8_t *x, size_t rows, const struct int8_matrix *m) {
    for (; rows > 1; rows -= 2, x += 2 * m->size, y += 2 * pitch) {
        two_rows(y, pitch, x, m);
    }
    if (rows > 0) {
        one_row(y, x, m);
    }
}

#endif // INT8_DSP
