// kernels.h: the arithmetic of training, float32, plain C: the reference for every faster kernel.
//
// Tensors are dense NCHW, n samples. A forward kernel assigns its outputs; a backward kernel only
// adds to the gradients it is given (dx, dw, db), so that branches and parts of a batch add up.
// What maps a tensor to one of its own size works in place instead, for the memory it saves:
// backward turns d from dLoss/dy into dLoss/dx, and forward takes an x that is y. No other arrays
// overlap. Kernels check nothing: the generator of the calls has checked shapes, device.c has
// checked bytes.
#ifndef KERNELS_H
#define KERNELS_H

#include <stddef.h>
#include <stdint.h>

// The shape of a convolution or of a pool (channels: in_channels = out_channels for a pool).
struct window {
    uint16_t in_channels, in_height, in_width;
    uint16_t out_channels, out_height, out_width;
    uint8_t kernel_height, kernel_width;
    uint8_t stride_height, stride_width;
    uint8_t padding_height, padding_width;
};

// conv2d.c. w is out x in x kh x kw; b is NULL or out. Of the gradients, any is NULL that is
// not wanted; x is read for dw alone, and w for dx.
void conv2d_forward(float *y, const float *x, const float *w, const float *b,
                    const struct window *s, size_t n);
void conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                     const float *w, const struct window *s, size_t n);

// grouped_conv2d.c. The same, with channels in groups: outputs see the inputs of their own group
// only. w is out x in/groups x kh x kw. groups = in_channels is a depthwise convolution.
void grouped_conv2d_forward(float *y, const float *x, const float *w, const float *b,
                            const struct window *s, size_t groups, size_t n);
void grouped_conv2d_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                             const float *w, const struct window *s, size_t groups, size_t n);

// linear.c. w is out x in, b is NULL or out.
void linear_forward(float *y, const float *x, const float *w, const float *b, size_t in, size_t out,
                    size_t n);
void linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                     const float *w, size_t in, size_t out, size_t n);

// group_norm.c. area = height x width; w and b have channels values; mean and rstd have
// n x groups values, assigned by forward and read by backward. Biased variance, as PyTorch.
// y may be x; backward works in place, and reads an x that is still there.
void group_norm_forward(float *y, float *mean, float *rstd, const float *x, const float *w,
                        const float *b, size_t channels, size_t groups, size_t area, float epsilon,
                        size_t n);
void group_norm_backward(float *d, float *dw, float *db, const float *x, const float *w,
                         const float *mean, const float *rstd, size_t channels, size_t groups,
                         size_t area, size_t n);

// batch_norm.c. area = height x width; every array beside x, y and their gradients has channels
// values. Variances are biased.
//
// The mean and variance of each channel over n samples, joined with those of seen samples before
// them, which stand in mean and variance; with seen = 0 both are assigned.
void batch_norm_measure(float *mean, float *variance, const float *x, size_t channels, size_t area,
                        size_t seen, size_t n);
// y with that mean and variance, whether those of x itself or running ones. y may be x; backward
// works in place, and reads an x that is still there.
void batch_norm_forward(float *y, const float *x, const float *w, const float *b, const float *mean,
                        const float *variance, size_t channels, size_t area, float epsilon,
                        size_t n);
// For a mean and variance that are those of the n samples of x, and so follow x.
void batch_norm_backward(float *d, float *dw, float *db, const float *x, const float *w,
                         const float *mean, const float *variance, size_t channels, size_t area,
                         float epsilon, size_t n);
// For a mean and variance that are constants.
void batch_norm_frozen_backward(float *d, float *dw, float *db, const float *x, const float *w,
                                const float *mean, const float *variance, size_t channels,
                                size_t area, float epsilon, size_t n);
// Moves running statistics towards those of a batch, of size elements a channel, by the share
// momentum; the variance unbiased, as PyTorch.
void batch_norm_follow(float *running_mean, float *running_variance, const float *mean,
                       const float *variance, size_t channels, size_t size, float momentum);

// elementwise.c, over size elements in all. y may be x; backward works in place.
//
// relu is max(x, 0), relu6 is min(max(x, 0), 6); x is a number: what becomes of a NaN is not said.
// Backward needs y, or bits: (size + 7) / 8 bytes, element i is bit i % 8 of byte i / 8, 1 where
// the gradient passes (x > 0; of relu6, 0 < x < 6), and 0 in what the last byte has to spare.
void relu_forward(float *y, const float *x, size_t size);
void relu_forward_bits(float *y, uint8_t *bits, const float *x, size_t size);
void relu_backward(float *d, const float *y, size_t size);
void relu_backward_bits(float *d, const uint8_t *bits, size_t size); // relu6's too
void relu6_forward(float *y, const float *x, size_t size);
void relu6_forward_bits(float *y, uint8_t *bits, const float *x, size_t size);
void relu6_backward(float *d, const float *y, size_t size);
// y may be a, b or both.
void add_forward(float *y, const float *a, const float *b, size_t size);
// to += from: where the gradients of a tensor with several readers meet.
void gradient_add(float *to, const float *from, size_t size);
// A gradient weighted in place; weight = 0 clears whatever is there, NaN included.
void gradient_weigh(float *g, float weight, size_t size);
// input = byte * scale[channel] + shift[channel]; images may be the last n x channels x area bytes
// of y itself.
void normalize_forward(float *y, const uint8_t *images, const float *scale, const float *shift,
                       size_t channels, size_t area, size_t n);

// half.c. To IEEE 754 binary16 and back: to the nearest, of two as near the even one, from 65520 on
// infinity; subnormals are kept, and NaN stays NaN.
void half_pack(uint16_t *h, const float *x, size_t size);
void half_unpack(float *x, const uint16_t *h, size_t size);

// pool.c. Padding counts as zeros for the average (divided by the whole window) and never wins the
// maximum; of equal maxima the first wins. winner: place of the maximum in its window, one byte per
// output element, assigned by forward (kernel_height x kernel_width <= 256).
void max_pool_forward(float *y, uint8_t *winner, const float *x, const struct window *s, size_t n);
void max_pool_backward(float *dx, const float *dy, const uint8_t *winner, const struct window *s,
                       size_t n);
void avg_pool_forward(float *y, const float *x, const struct window *s, size_t n);
void avg_pool_backward(float *dx, const float *dy, const struct window *s, size_t n);

// loss.c. Assigns p = softmax(logits); adds the losses, each times scale, to *loss, and the number
// of samples whose largest logit is the label to *correct (either pointer may be NULL).
void softmax_cross_entropy_forward(float *p, float *loss, uint32_t *correct, const float *logits,
                                   const uint8_t *labels, float scale, size_t classes, size_t n);
// Takes another softmax as the teacher of p: with it, backward below has the targets
// (1 - share) * onehot(label) + share * teacher.
void softmax_distill(float *p, const float *teacher, const uint8_t *labels, float share,
                     size_t classes, size_t n);
// dlogits += (p - onehot(label)) * scale
void softmax_cross_entropy_backward(float *dlogits, const float *p, const uint8_t *labels,
                                    float scale, size_t classes, size_t n);

// sgd.c. PyTorch's SGD, nesterov off: g += decay * w; v = momentum * v + g; w -= rate * v.
// v may be NULL when momentum is 0.
void sgd_step(float *w, float *v, const float *g, float rate, float momentum, float decay,
              size_t size);

#endif
