// fast_sizes.c: the sizes of fast.h, which are inline there, as functions of a library.
#include "kernels/fast/fast.h"

size_t conv2d_scratch(const struct window *s);
size_t depthwise_scratch(const struct window *s);

size_t conv2d_scratch(const struct window *s) {
    return fast_conv2d_scratch(s);
}

size_t depthwise_scratch(const struct window *s) {
    return fast_depthwise_scratch(s);
}
