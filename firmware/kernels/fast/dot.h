// dot.h: the gradient of a 3x3 kernel: each weight's is the dot product of what it sees and of dy.
#ifndef DOT_H
#define DOT_H

#include <stddef.h>

// The gradients of the weights that take one channel in, and what they are sums of.
struct taps {
    float *dw;      // 3x3 in the first lane
    size_t dw_lane; // floats from a lane to the next
    size_t lanes;
    const float *dy; // rows x width in the first lane
    size_t dy_lane;
    size_t rows, width;
    const float *x; // in the band: what the first tap of the first pixel sees
    size_t pitch;   // floats of the band from a row to the next
    size_t stride;  // pixels of the band, a pixel of dy
};

void dot_add(const struct taps *t);

#endif
