// mve_mix.c: mix.c with vectors: four lanes of a pixel, or of a weight's gradient, are one.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/mix.h"
#include "kernels/fast/span.h" // ROLLED

// Four instructions for 16 multiply-adds come with four others. step is a constant wherever this
// is used: every step-th pixel of `from` takes part.
__attribute__((always_inline)) static inline void mix(const struct tiles *t, const int step) {
    CORES7(x, r1, r2, r3, r4, r5, r6, r8);
    const float *first = t->from;
    uint32x4_t to = lanes_at(t->to);
    for (size_t tile = t->count; tile > 0; tile--, first += t->advance) {
        const float *from = first, *w = t->w[0];
        TILE_LANES(to);
        for (size_t channel = t->channels; channel > 0; channel--) {
            const float32x4_t g = vldrwq_f32(w);
            w += 4;
            if (step == 2) {
                CORE_LOAD7(x, from);
                TAP_LANES(g, x0, x2, x4, x6);
            } else {
                CORE_LOAD4(x, from);
                TAP_LANES(g, x0, x1, x2, x3);
            }
            from += t->plane;
        }
        PUT_LANES(to);
    }
}

void mix_1(const struct tiles *t) {
    mix(t, 1);
}

void mix_2(const struct tiles *t) {
    mix(t, 2);
}

// Three pixels at a time: 12 instructions for 48 multiply-adds come with nine others.
void products_add(const struct products *t) {
    CORES3(x, r4, r5, r6);
    const float *from0 = t->x[0], *from1 = t->x[1], *from2 = t->x[2], *from3 = t->x[3];
    uint32x4_t dy = lanes_at(t->dy), to = lanes_at(t->to);
    TILE_LANES(to); // a pixel of it is a channel here
    for (size_t three = t->pixels / 3; three > 0; three--) {
        const float32x4_t g0 = LANES_GET(dy, 0), g1 = LANES_GET(dy, 1), g2 = LANES_GET(dy, 2);
        CORE_TAKE3(x, from0);
        a = vfmaq_n_f32(vfmaq_n_f32(vfmaq_n_f32(a, g0, x0), g1, x1), g2, x2);
        CORE_TAKE3(x, from1);
        b = vfmaq_n_f32(vfmaq_n_f32(vfmaq_n_f32(b, g0, x0), g1, x1), g2, x2);
        CORE_TAKE3(x, from2);
        c = vfmaq_n_f32(vfmaq_n_f32(vfmaq_n_f32(c, g0, x0), g1, x1), g2, x2);
        CORE_TAKE3(x, from3);
        d = vfmaq_n_f32(vfmaq_n_f32(vfmaq_n_f32(d, g0, x0), g1, x1), g2, x2);
        LANES_MOVE(dy, 3);
    }
    ROLLED for (size_t i = t->pixels % 3; i > 0; i--) {
        const float32x4_t g = LANES_GET(dy, 0);
        TAP_LANES(g, *from0++, *from1++, *from2++, *from3++);
        LANES_MOVE(dy, 1);
    }
    PUT_LANES(to);
}

#endif // MVE
