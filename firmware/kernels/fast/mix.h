// mix.h: the inner loops of the 1x1 convolution: weights of four lanes mix the channels of a pixel.
#ifndef MIX_H
#define MIX_H

#include "kernels/fast/tile.h" // struct tiles

// w[0] has the weights of a channel in all four lanes side by side, channel after channel. mix_2
// is for where every second pixel of `from` takes part.
tile_kernel mix_1, mix_2;

// The gradients of the weights of four lanes for four channels, and what they are sums of.
struct products {
    float *to[4];       // the first channel's in each lane
    const float *dy[4]; // each lane
    const float *x[4];  // each channel
    size_t pixels;
};

void products_add(const struct products *t);

#endif
