// trainer.c: which steps of the segment run, and what stands between them.
#include "core/trainer.h" // itself

#include <string.h>

#include "core/step.h"       // the update
#include "kernels/kernels.h" // normalize_forward

static int takes_part(struct step step, const struct pass *pass) {
    switch (step.part) {
    case STEP_TRUNK:
        return step.stage <= pass->cut;
    case STEP_EXIT:
        return step.stage <= pass->cut && step_exit_learns(step.stage, pass->cut, pass->upto);
    default: // STEP_CUT, STEP_UPTO
        return step.stage == pass->cut && (step.part == STEP_CUT || pass->upto);
    }
}

void trainer_run(struct pass *pass, unsigned start, unsigned stop) {
    for (unsigned step = start; step < stop; step++) {
        if (takes_part(segment.steps[step], pass)) {
            segment_run(step, pass);
        }
    }
}

void trainer_put(size_t i, uint8_t label, const uint8_t *image) {
    const size_t size = segment.input_size;
    segment.labels[i] = label;
    normalize_forward((float *)segment.input + i * size, image, segment.scale, segment.shift,
                      segment.channels, size / segment.channels, 1);
}

void trainer_begin(struct pass *pass) {
    if (segment.gradients) {
        memset(segment.gradients, 0, segment.parameter_size * sizeof(float));
    }
    *pass = (struct pass){
        .learns = 1, .cut = pass->cut, .upto = pass->upto, .settings = pass->settings};
}

void trainer_forward(struct pass *pass, size_t count, size_t batch) {
    pass->seen += pass->count;
    pass->count = count;
    pass->inverse_batch = 1.0f / (float)batch;
    pass->exit_weight = pass->settings->exit_weight;
    pass->server_weight = pass->settings->server_weight;
    pass->labels = segment.labels;
    trainer_run(pass, 0, segment.forward_end);
}

void trainer_backward(struct pass *pass) {
    if (!segment.gradients && step_finite(&pass->loss, 1) == 0) {
        pass->failed = 1; // before any layer learns
        pass->bad = NOT_FINITE_LOSS;
    }
    trainer_run(pass, segment.forward_end, segment.backward_end);
}

int trainer_step(struct pass *pass) {
    const int taken = segment.gradients
                          ? step_take(pass->cut, pass->upto, pass->loss, pass->settings, &pass->bad)
                          : !pass->failed;
    if (taken) {
        trainer_run(pass, segment.backward_end, segment.step_end);
    }
    return taken;
}

void trainer_infer(struct pass *pass, size_t count) {
    pass->count = count;
    trainer_run(pass, 0, segment.infer_end);
}
