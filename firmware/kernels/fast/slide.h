// slide.h: a 3x3 kernel slides over a band of rows: the inner loops of the forward pass and of dx.
#ifndef SLIDE_H
#define SLIDE_H

#include "kernels/fast/tile.h" // struct tiles

// Stride 1 and stride 2: w holds the channels of the band one behind the other (w_step is 9).
tile_kernel slide_1, slide_2;

// Stride 1 and the kernel turned round, for any w_step.
tile_kernel slide_turned;

// Stride 2 and turned round, for one row of the kernel, which w points at: two pixels of a tile for
// one of the band (advance is 2). A tile's first pixel lies under the middle of the kernel.
tile_kernel slide_spread;

#endif
