// int8.h: the arithmetic of inference in 8 bits: TensorFlow Lite's, bit for bit.
//
// Tensors are dense NHWC, n samples. A real number is scale * (q - zero); weights have no zero. A
// sum of products is brought to the scale of its output by an int32 multiplier and a shift, with
// the two roundings of TensorFlow Lite's reference kernels and of TFLM's (int8_scale.h). Of
// FULLY_CONNECTED that is TFLM's arithmetic and that of a 1x1 CONV_2D; LiteRT's own reference of
// that one operator rounds a double, once.
//
// Padding is `zero`, which stands for the real 0. Biases come with -zero * (sum of their weights)
// added, so that kernels multiply what the tensors have. All sums fit an int32, also times 2^shift
// where that is above 1. Arrays do not overlap, but where it is said. Kernels check nothing.
#ifndef INT8_H
#define INT8_H

#include "kernels/kernels.h" // struct window

// How sums become outputs: zero + sum * multiplier / 2^31 * 2^shift, in min ... max. A multiplier
// is in 0 ... 2^31 - 1, a shift in -31 ... 30. An activation is in min and max.
struct int8_output {
    const int32_t *multiplier; // an output channel's, or one for all, as each kernel says
    const int8_t *shift;
    int8_t zero, min, max;
};

// int8_conv2d.c. CONV_2D: w is out x kh x kw x in/groups, b is out; multipliers are an output
// channel's.
void int8_conv2d(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b,
                 const struct window *s, size_t groups, int8_t zero, const struct int8_output *to,
                 size_t n, int8_t *scratch);

// Pixels whose inputs are gathered at once: four, or more by fours where these fit into
// INT8_SCRATCH_SOME bytes. The bytes that this may take.
#define INT8_PIXELS 4u
#define INT8_PIXELS_MAX 16u
#define INT8_SCRATCH_SOME 512u
#define INT8_SCRATCH_MAX 4096u

// Bytes of scratch of a convolution: what one to sixteen pixels see. Nothing is kept there.
static inline size_t int8_conv2d_scratch(const struct window *s, size_t groups) {
    const size_t one = (size_t)s->kernel_height * s->kernel_width * (s->in_channels / groups);
    const size_t fours = INT8_SCRATCH_SOME / one / INT8_PIXELS * INT8_PIXELS;
    const size_t least = INT8_SCRATCH_MAX / one;
    const size_t few = least < 1 ? 1 : least < INT8_PIXELS ? least : INT8_PIXELS;
    const size_t many = fours < INT8_PIXELS_MAX ? fours : INT8_PIXELS_MAX;
    return one * (many > few ? many : few);
}

// int8_depthwise.c. DEPTHWISE_CONV_2D: each channel on its own (out_channels = in_channels); w is
// kh x kw x channels, kh x kw at most INT8_TAPS; multipliers are a channel's. scratch: in_channels
// bytes.
#define INT8_TAPS 49
void int8_depthwise(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b,
                    const struct window *s, int8_t zero, const struct int8_output *to, size_t n,
                    int8_t *scratch);

// int8_group_norm.c. A group norm: a depthwise convolution of single pixels, its weights and biases
// made for each sample. A group's mean and each channel's sum of squares (with epsilon) are brought
// to int8, then to floats; what follows is float, in steps of x, each operation rounded by itself:
// variance = sum of squares - mean^2, no less than floor; weight = factor / sqrt(variance), as
// int8; bias = shift - mean * weight, as int32. The zero of x is 0.
struct int8_norm {
    int32_t mean_multiplier, square_multiplier;
    int8_t mean_shift, square_shift;
    float mean_scale, square_scale;
    const int32_t *epsilon;      // a channel's
    const float *floor;          // a group's
    const float *factor, *shift; // a channel's
};
// Multipliers are a channel's. area is height x width, at most 2^16. y may be x. scratch:
// INT8_NORM_SCRATCH bytes.
#define INT8_NORM_SCRATCH(channels) ((sizeof(int32_t) + 1) * (channels))
void int8_group_norm(int8_t *y, const int8_t *x, const struct int8_norm *norm, size_t channels,
                     size_t groups, size_t area, const struct int8_output *to, size_t n,
                     int32_t *scratch);

// int8_linear.c. FULLY_CONNECTED: w is out x in, b is out; one multiplier.
void int8_linear(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b, size_t in,
                 size_t out, const struct int8_output *to, size_t n);

// int8_elementwise.c, over size elements in all.
//
// RELU, RELU6 and QUANTIZE: (x - zero) brought to another scale; one multiplier. y may be x.
void int8_rescale(int8_t *y, const int8_t *x, int8_t zero, const struct int8_output *to,
                  size_t size);

// ADD: both inputs, times 2^20, are brought to one scale, which is that of their sum.
struct int8_addend {
    int32_t multiplier; // of input * 2^20
    int8_t shift;       // 0 or less
    int8_t zero;
};
// One multiplier. y may be a, b or both.
void int8_add(int8_t *y, const int8_t *a, const struct int8_addend *of_a, const int8_t *b,
              const struct int8_addend *of_b, const struct int8_output *to, size_t size);

// int8_pool.c.
//
// MEAN over area = height x width; one multiplier, that of a sum, which divides by area too.
void int8_mean(int8_t *y, const int8_t *x, size_t channels, size_t area, int8_t zero,
               const struct int8_output *to, size_t n);
// MAX_POOL_2D: padding never wins. Every window has a tap inside the image.
void int8_max_pool(int8_t *y, const int8_t *x, const struct window *s, size_t n);
// AVERAGE_POOL_2D of an image that has been padded: divided by the whole window. Input and output
// have one scale and `zero`; halves go away from 0.
void int8_avg_pool(int8_t *y, const int8_t *x, const struct window *s, int8_t zero, size_t n);

#endif
