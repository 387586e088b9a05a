// fused.c: the update of one layer, right behind its gradient.
#include "core/fused.h" // itself

#include "core/step.h" // what all updates do

void fused_learn(struct pass *pass, uint32_t first, float *g, size_t size) {
    if (pass->failed) {
        return;
    }
    const size_t finite = step_finite(g, size);
    if (finite < size) {
        pass->failed = 1;
        pass->bad = first + (uint32_t)finite;
        return;
    }
    step_update(segment.weights + first, NULL, g, 1, pass->settings, size);
}
