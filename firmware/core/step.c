// step.c: the step of a batch, once its gradients are summed.
#include "core/step.h" // itself

#include <math.h>
#include <string.h>

#include "core/segment.h"      // weights, momentum, gradients
#include "kernels/fast/fast.h" // fast_sgd_step
#include "kernels/sum.h"       // sums

#define CLIP_EPSILON 1e-6f // torch.nn.utils.clip_grad_norm_ has the same

size_t step_finite(const float *values, size_t size) {
    const uint32_t exponent = 0x7F800000u; // all ones in an infinity and in a NaN, nowhere else
    for (size_t i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        if ((bits & exponent) == exponent) {
            return i;
        }
    }
    return size;
}

float step_factor(float squares, float clip) {
    const float factor = clip > 0 ? clip / (sqrtf(squares) + CLIP_EPSILON) : 1;
    return factor < 1 ? factor : 1;
}

void step_update(float *w, float *v, float *g, float factor, const struct message_settings *s,
                 size_t size) {
    for (size_t i = 0; factor < 1 && i < size; i++) {
        g[i] *= factor;
    }
    fast_sgd_step(w, v, g, s->learning_rate, s->momentum, s->weight_decay, size);
}

struct range {
    uint32_t first, end;
};

// The parameters of a stage that learn: those of its trunk, and of its exit where that does.
static struct range learning(unsigned stage, unsigned cut, int upto) {
    const struct stage *const at = &segment.stages[stage];
    return (struct range){
        .first = stage > 0 ? at[-1].parameters_end : 0,
        .end = step_exit_learns(stage, cut, upto) ? at->parameters_end : at->exit_parameters,
    };
}

int step_take(unsigned cut, int upto, float loss, const struct message_settings *s, uint32_t *bad) {
    float squares = 0;
    for (unsigned i = 0; i <= cut; i++) {
        const struct range r = learning(i, cut, upto);
        const float *const g = segment.gradients + r.first;
        *bad = r.first + (uint32_t)step_finite(g, r.end - r.first);
        if (*bad < r.end) {
            return 0;
        }
        squares += s->clip > 0 ? sums(g, 0, g, 0, r.end - r.first).products : 0;
    }
    if (step_finite(&loss, 1) == 0) {
        *bad = NOT_FINITE_LOSS;
        return 0;
    }
    const float factor = step_factor(squares, s->clip);
    for (unsigned i = 0; i <= cut; i++) {
        const struct range r = learning(i, cut, upto);
        float *const v = segment.momentum ? segment.momentum + r.first : NULL;
        step_update(segment.weights + r.first, v, segment.gradients + r.first, factor, s,
                    r.end - r.first);
    }
    return 1;
}
