// band.h: a band of an image's rows, copied into scratch with the padding around it, so that no
// inner loop ever asks where the image ends.
#ifndef BAND_H
#define BAND_H

#include <stddef.h>

struct band {
    size_t channels, rows, width; // of the copy: dense, channel by channel, row by row
    ptrdiff_t top, left;          // the pixel of the image that its first one is
};

// Fills `to` from planes of height x width; outside of them are zeros.
void band_fill(float *to, const struct band *b, const float *planes, size_t height, size_t width);

#endif
