// band.c: a band of an image's rows, copied into scratch with the padding around it.
#include "kernels/fast/band.h"

#include "kernels/fast/span.h" // copies and zeros

// What a band has of an image along one axis: returns how many, which lie behind *before of the
// band and behind *first of the image.
static size_t overlap(size_t *before, size_t *first, ptrdiff_t start, size_t band, size_t image) {
    *before = start < 0 ? (size_t)-start : 0;
    *first = start > 0 ? (size_t)start : 0;
    if (*before >= band || *first >= image) {
        return 0;
    }
    const size_t left = image - *first;
    return left < band - *before ? left : band - *before;
}

void band_fill(float *to, const struct band *b, const float *planes, size_t height, size_t width) {
    size_t above, y, before, x;
    const size_t rows = overlap(&above, &y, b->top, b->rows, height);
    const size_t columns = overlap(&before, &x, b->left, b->width, width);
    span_fill(to, 0, b->channels * b->rows * b->width);
    for (size_t channel = 0; channel < b->channels; channel++) {
        float *pixels = to + (channel * b->rows + above) * b->width + before;
        const float *from = planes + (channel * height + y) * width + x;
        for (size_t row = 0; row < rows; row++) {
            span_copy(pixels, from, columns);
            pixels += b->width;
            from += width;
        }
    }
}
