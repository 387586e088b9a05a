// fused.h: a layer learns as soon as its gradient is there, so that no two layers' gradients need
// memory at once. For batches of one part, without momentum and clipping.
#ifndef FUSED_H
#define FUSED_H

#include "core/segment.h" // struct pass

// Learns from the gradients of the size parameters from first on. From the first gradient on that
// is not finite, nothing learns any more in this pass, which then says which one that was.
void fused_learn(struct pass *pass, uint32_t first, float *g, size_t size);

#endif
