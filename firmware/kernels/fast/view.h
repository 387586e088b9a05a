// view.h: pixels that see a band through a 3x3 kernel: the inner loops of the depthwise
// convolution.
#ifndef VIEW_H
#define VIEW_H

#include <stddef.h>

// Rows of pixels that see, or are seen by, a band through the kernel.
struct view {
    size_t rows, width, stride; // stride: pixels of the band, a pixel
    const float *band;
    size_t pitch; // floats from a row of the band to the next
};

// Adds what they see to the pixels, which are dense.
void view_see(float *to, const float *weights, const struct view *v);

// Adds to the gradients of the weights what the pixels, with gradients dy, give them.
void view_weigh(float *dw, const float *dy, const struct view *v);

#endif
