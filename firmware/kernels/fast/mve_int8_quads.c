// mve_int8_quads.c: rows times a matrix with vectors: four rows meet two channels.
//
// A channel's sums of four rows are a vector, so that its bias, multiplier and shift are scalars,
// which instructions take as they are. The weights of short rows stay in registers for all rows.
//
// Assembly, because GCC 12 has no words for loops whose lanes behind the end are 0, joins sums by
// way of memory, and loads the numbers of two channels one by one: with it a convolution of 3
// channels takes twice as long.
#include "kernels/int8_simd.h"

#if INT8_MVE

#include <arm_mve.h>

#include "kernels/fast/mve_int8_quads.h"

// ---- sums of four rows ----

struct sums {
    int32x4_t first, second; // channel
};

// Rows 0 and 2, or 1 and 3.
struct half {
    int32_t first0, first2, second0, second2;
};

// Two rows of any size meet two channels.
static inline struct half two_rows(const int8_t *x0, const int8_t *x2, const int8_t *w0,
                                   const int8_t *w1, size_t size) {
    struct half s = {0};
    __asm__ volatile(
        "wlstp.8 lr, %[size], 2f\n\t"
        "1: vldrb.8 q0, [%[x0]], #16\n\t"
        "vldrb.8 q1, [%[w0]], #16\n\t"
        "vldrb.8 q2, [%[x2]], #16\n\t"
        "vmladava.s8 %[s00], q0, q1\n\t"
        "vldrb.8 q3, [%[w1]], #16\n\t"
        "vmladava.s8 %[s20], q2, q1\n\t"
        "vmladava.s8 %[s01], q0, q3\n\t"
        "vmladava.s8 %[s21], q2, q3\n\t"
        "letp lr, 1b\n\t"
        "2:"
        : [x0] "+r"(x0), [x2] "+r"(x2), [w0] "+r"(w0), [w1] "+r"(w1), [s00] "+Te"(s.first0),
          [s20] "+Te"(s.first2), [s01] "+Te"(s.second0), [s21] "+Te"(s.second2)
        : [size] "r"(size)
        : "q0", "q1", "q2", "q3", "lr", "memory");
    return s;
}

static inline int32x4_t joined(int32_t s0, int32_t s1, int32_t s2, int32_t s3) {
    int32x4_t sums;
    __asm__("vmov %q[sums][2], %q[sums][0], %[s0], %[s2]\n\t"
            "vmov %q[sums][3], %q[sums][1], %[s1], %[s3]"
            : [sums] "=&w"(sums)
            : [s0] "r"(s0), [s1] "r"(s1), [s2] "r"(s2), [s3] "r"(s3));
    return sums;
}

static inline struct sums any_rows(const int8_t *x, const int8_t *w, size_t size) {
    const struct half even = two_rows(x, x + 2 * size, w, w + size, size);
    const struct half odd = two_rows(x + size, x + 3 * size, w, w + size, size);
    return (struct sums){joined(even.first0, odd.first0, even.first2, odd.first2),
                         joined(even.second0, odd.second0, even.second2, odd.second2)};
}

// The weights of a channel whose rows have 16 ... 32 bytes: the first sixteen, and the last sixteen
// with 0 for those that are among the first.
struct weights {
    int8x16_t low, high;
};

static inline struct weights weights(const int8_t *w, size_t size) {
    const int8x16_t lane = vreinterpretq_s8_u8(vidupq_n_u8(0, 1));
    const mve_pred16_t fresh = vcmpgeq_n_s8(lane, (int8_t)(32 - size));
    return (struct weights){vldrbq_s8(w), vldrbq_z_s8(w + size - 16, fresh)};
}

// A row of 16 bytes meets two channels; x moves on to the next one.
#define ROW_OF_16(first, second)                                                                   \
    "vldrb.8 q0, [%[x]], #16\n\t"                                                                  \
    "vmladav.s8 " first ", q0, %q[low0]\n\t"                                                       \
    "vmladav.s8 " second ", q0, %q[low1]\n\t"

// A row of 16 ... 32 bytes, the last sixteen of which begin `more` bytes behind its beginning.
#define ROW_OF_32(first, second)                                                                   \
    "vldrb.8 q0, [%[x]]\n\t"                                                                       \
    "add %[x], %[more]\n\t"                                                                        \
    "vmladav.s8 " first ", q0, %q[low0]\n\t"                                                       \
    "vmladav.s8 " second ", q0, %q[low1]\n\t"                                                      \
    "vldrb.8 q0, [%[x]], #16\n\t"                                                                  \
    "vmladava.s8 " first ", q0, %q[high0]\n\t"                                                     \
    "vmladava.s8 " second ", q0, %q[high1]\n\t"

// What sums across a vector is one of the even registers. Two vectors' lanes 0 and 2 come first.
#define FOUR_ROWS(row)                                                                             \
    row("r0", "r2") row("r4", "r6")                                                                \
        row("r8", "r10") "vmov %q[s0][2], %q[s0][0], r0, r8\n\t"                                   \
                         "vmov %q[s1][2], %q[s1][0], r2, r10\n\t" row(                             \
                             "r8", "r10") "vmov %q[s0][3], %q[s0][1], r4, r8\n\t"                  \
                                          "vmov %q[s1][3], %q[s1][1], r6, r10"

static inline struct sums rows_of_16(const int8_t **x, const struct weights *g) {
    struct sums s;
    __asm__ volatile(FOUR_ROWS(ROW_OF_16)
                     : [x] "+r"(*x), [s0] "=&w"(s.first), [s1] "=&w"(s.second)
                     : [low0] "w"(g[0].low), [low1] "w"(g[1].low)
                     : "r0", "r2", "r4", "r6", "r8", "r10", "q0", "memory");
    return s;
}

static inline struct sums rows_of_32(const int8_t **x, size_t more, const struct weights *g) {
    struct sums s;
    __asm__ volatile(FOUR_ROWS(ROW_OF_32)
                     : [x] "+r"(*x), [s0] "=&w"(s.first), [s1] "=&w"(s.second)
                     : [more] "r"(more), [low0] "w"(g[0].low), [high0] "w"(g[0].high),
                       [low1] "w"(g[1].low), [high1] "w"(g[1].high)
                     : "r0", "r2", "r4", "r6", "r8", "r10", "q0", "memory");
    return s;
}

// ---- outputs ----

// How the sums of two channels become outputs, as put() loads it.
struct pair {
    int32_t bias[2], multiplier[2], shift[2];
    int32_t zero, unused;
    int16x8_t min, max;
};

static inline void take(struct pair *p, const struct int8_matrix *m, size_t channel) {
    const size_t first = channel * m->step, second = first + m->step;
    p->bias[0] = m->b[channel];
    p->bias[1] = m->b[channel + 1];
    p->multiplier[0] = m->to.multiplier[first];
    p->multiplier[1] = m->to.multiplier[second];
    p->shift[0] = m->to.shift[first];
    p->shift[1] = m->to.shift[second];
}

// Where outputs go: the next ones of the first row, from there to those of each of the four rows,
// and to the next four rows once the second channel has been written.
struct places {
    int8_t *next;
    uint32x4_t rows;
    size_t step;
};

// mve_multiply of mve_int8_scale.h, for shifts below 0: the 1 that has to be taken away from what
// is below 0 is there before the product, which is then added to it. Both channels' outputs of a
// row make a word, of which bytes 0 and 2 are stored.
static inline void put(struct sums s, const struct pair *p, struct places *to) {
    __asm__ volatile("ldmia %[p], {r0, r2, r4, r6, r8, r10}\n\t"
                     "vadd.i32 %q[s0], %q[s0], r0\n\t"
                     "ldr r0, [%[p], #24]\n\t"
                     "vadd.i32 %q[s1], %q[s1], r2\n\t"
                     "vshr.s32 q0, %q[s0], #31\n\t"
                     "vqrdmlah.s32 q0, %q[s0], r4\n\t"
                     "vshr.s32 %q[s0], %q[s1], #31\n\t"
                     "vqrdmlah.s32 %q[s0], %q[s1], r6\n\t"
                     "vrshl.s32 q0, r8\n\t"
                     "vrshl.s32 %q[s0], r10\n\t"
                     "vqmovnb.s32 %q[s1], q0\n\t"
                     "vqmovnt.s32 %q[s1], %q[s0]\n\t"
                     "vldrh.16 q0, [%[p], #32]\n\t"
                     "vqadd.s16 %q[s1], %q[s1], r0\n\t"
                     "vldrh.16 %q[s0], [%[p], #48]\n\t"
                     "vmax.s16 %q[s1], %q[s1], q0\n\t"
                     "vmin.s16 %q[s1], %q[s1], %q[s0]\n\t"
                     "vstrb.32 %q[s1], [%[next], %q[rows]]\n\t"
                     "vshr.s32 %q[s1], %q[s1], #16\n\t"
                     "add %[next], #1\n\t"
                     "vstrb.32 %q[s1], [%[next], %q[rows]]\n\t"
                     "add %[next], %[step]"
                     : [next] "+r"(to->next), [s0] "+w"(s.first), [s1] "+w"(s.second)
                     : [p] "r"(p), [rows] "w"(to->rows), [step] "r"(to->step)
                     : "r0", "r2", "r4", "r6", "r8", "r10", "q0", "memory");
}

// ---- rows ----

void mve_int8_quads(int8_t *y, size_t pitch, const int8_t *x, size_t quads,
                    const struct int8_matrix *m) {
    const size_t size = m->size;
    struct pair p;
    p.zero = m->to.zero;
    p.min = vdupq_n_s16(m->to.min);
    p.max = vdupq_n_s16(m->to.max);
    struct places to = {.rows = vmulq_n_u32(vidupq_n_u32(0, 1), (uint32_t)pitch),
                        .step = 4 * pitch - 1};
    const int8_t *w = m->w;
    for (size_t channel = 0; channel + 2 <= m->channels; channel += 2, w += 2 * size) {
        take(&p, m, channel);
        to.next = y + channel;
        const int8_t *seen = x;
        if (size < 16 || size > 32) {
            for (size_t quad = quads; quad > 0; quad--, seen += 4 * size) {
                put(any_rows(seen, w, size), &p, &to);
            }
            continue;
        }
        const struct weights g[2] = {weights(w, size), weights(w + size, size)};
        if (size == 16) {
            for (size_t quad = quads; quad > 0; quad--) {
                put(rows_of_16(&seen, g), &p, &to);
            }
        } else {
            for (size_t quad = quads; quad > 0; quad--) {
                put(rows_of_32(&seen, size - 16, g), &p, &to);
            }
        }
    }
}

#endif // INT8_MVE
