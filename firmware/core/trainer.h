// trainer.h: one batch on the segment: forward, backward and the step, as a device does them for
// its host, and as any program can that has a segment built in.
//
// A pass begins with the cut, the exits and the settings to learn with; gradients of the parts of a
// batch add up until the step. Nothing is checked: counts are at most segment.capacity, labels are
// below segment.classes, and the settings are some that the segment was built for.
#ifndef TRAINER_H
#define TRAINER_H

#include <stddef.h>
#include <stdint.h>

#include "core/segment.h" // struct pass

#ifdef __cplusplus
extern "C" {
#endif

// Puts an image (segment.input_size bytes, channel after channel) and its label at place i of the
// part that runs next.
void trainer_put(size_t i, uint8_t label, const uint8_t *image);

// Begins a batch: nothing is summed yet. Cut, exits and settings of the pass stay.
void trainer_begin(struct pass *pass);

// Runs count samples forward as a part of a batch of batch samples, and adds their loss.
void trainer_forward(struct pass *pass, size_t count, size_t batch);

// Runs that part backward. Where settings weigh the server's gradient, it is in its place.
void trainer_backward(struct pass *pass);

// Learns from the whole batch. Returns 0 and learns nothing where a gradient or the loss is not
// finite: pass->bad then says which.
int trainer_step(struct pass *pass);

// Answers count samples: activations and logits are in their places, and nothing is learnt. A batch
// that is under way has another pass.
void trainer_infer(struct pass *pass, size_t count);

// Runs those of the steps start..stop-1 that the pass takes.
void trainer_run(struct pass *pass, unsigned start, unsigned stop);

#ifdef __cplusplus
}
#endif

#endif
