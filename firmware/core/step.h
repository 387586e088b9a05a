// step.h: what becomes of the gradients of a whole batch: checked, clipped, and only then learnt
// from.
#ifndef STEP_H
#define STEP_H

#include <stddef.h>
#include <stdint.h>

#include "protocol/messages.h" // struct message_settings

// Whether the exit of a stage up to the cut learns: all of them do, or only the one at the cut.
static inline int step_exit_learns(unsigned stage, unsigned cut, int upto) {
    return upto || stage == cut;
}

// How many values stand before the first that is infinite or no number: size where there is none.
size_t step_finite(const float *values, size_t size);

// What gradients are multiplied with so that their norm is at most clip: 1 where it is, or where
// clip is 0. squares is the sum of their squares.
float step_factor(float squares, float clip);

// Learns from size gradients, which it multiplies with factor first; v is NULL without momentum.
void step_update(float *w, float *v, float *g, float factor, const struct message_settings *s,
                 size_t size);

// Takes the step of a batch with that loss, for the stages up to the cut and those of their exits
// that learn; layers that take no part keep still: no decay, no momentum. Returns 0 and changes
// nothing when a gradient or the loss is not finite: bad is then the place of the first such
// gradient among the parameters, or NOT_FINITE_LOSS.
int step_take(unsigned cut, int upto, float loss, const struct message_settings *s, uint32_t *bad);

#endif
