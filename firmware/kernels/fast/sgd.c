// sgd.c: one step of stochastic gradient descent, eight weights at a time.
#include "kernels/fast/mve.h" // whether mve_sgd.c takes its place

#if !MVE

#include "kernels/fast/fast.h"
#include "kernels/fast/span.h" // eight at a time

void fast_sgd_step(float *w, float *v, const float *g, float rate, float momentum, float decay,
                   size_t size) {
    SINGLES8(a, s0, s1, s2, s3, s4, s5, s6, s7);         // weights
    SINGLES8(b, s8, s9, s10, s11, s12, s13, s14, s15);   // their step
    SINGLES8(c, s16, s17, s18, s19, s20, s21, s22, s23); // the step before
    for (; size >= 8; size -= 8) {
        LOAD8(a, w);
        TAKE8(b, g);
        if (decay > 0) {
            SPAN_ADD8(b, decay, a);
        }
        if (v) {
            LOAD8(c, v);
            SPAN_ADD8(b, momentum, c);
            PUT8(v, b);
        }
        SPAN_ADD8(a, -rate, b);
        PUT8(w, a);
    }
    sgd_step(w, v, g, rate, momentum, decay, size);
}

#endif // !MVE
