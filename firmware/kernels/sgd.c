// sgd.c: one step of stochastic gradient descent.
#include "kernels/kernels.h"

void sgd_step(float *w, float *v, const float *g, float rate, float momentum, float decay,
              size_t size) {
    for (size_t i = 0; i < size; i++) {
        float step = g[i] + decay * w[i];
        if (v) {
            step += momentum * v[i];
            v[i] = step;
        }
        w[i] -= rate * step;
    }
}
