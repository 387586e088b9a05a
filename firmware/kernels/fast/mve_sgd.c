// mve_sgd.c: sgd.c with vectors, four weights at a time.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/fast.h"

// decays and moves are constants wherever this is used: whether decay is above 0, v is there.
__attribute__((always_inline)) static inline void steps(float *w, float *v, const float *g,
                                                        float rate, float momentum, float decay,
                                                        size_t fours, const int decays,
                                                        const int moves) {
    for (; fours > 0; fours--, w += 4, g += 4) {
        const float32x4_t weights = vldrwq_f32(w);
        float32x4_t step = vldrwq_f32(g);
        if (decays) {
            step = vfmaq_n_f32(step, weights, decay);
        }
        if (moves) {
            step = vfmaq_n_f32(step, vldrwq_f32(v), momentum);
            vstrwq_f32(v, step);
            v += 4;
        }
        vstrwq_f32(w, vfmaq_n_f32(weights, step, -rate));
    }
}

void fast_sgd_step(float *w, float *v, const float *g, float rate, float momentum, float decay,
                   size_t size) {
    const size_t fours = size / 4, done = 4 * fours;
    if (decay > 0) {
        if (v) {
            steps(w, v, g, rate, momentum, decay, fours, 1, 1);
        } else {
            steps(w, v, g, rate, momentum, decay, fours, 1, 0);
        }
    } else if (v) {
        steps(w, v, g, rate, momentum, decay, fours, 0, 1);
    } else {
        steps(w, v, g, rate, momentum, decay, fours, 0, 0);
    }
    sgd_step(w + done, v ? v + done : v, g + done, rate, momentum, decay, size - done);
}

#endif // MVE
