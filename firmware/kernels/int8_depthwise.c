// int8_depthwise.c: the depthwise convolution in 8 bits: finds what a pixel sees, tap by tap of
// int8_taps.h. A tap outside of the image sees a pixel of padding.
#include "kernels/int8.h"
#include "kernels/int8_bytes.h" // padding
#include "kernels/int8_taps.h"  // the sums

// The taps of a window that lies inside the image; `step` and `pitch` bytes from one to the next.
static void look_inside(const int8_t **at, const int8_t *from, const struct window *s,
                        size_t pitch) {
    for (size_t ky = s->kernel_height; ky > 0; ky--, from += pitch) {
        const int8_t *seen = from;
        for (size_t kx = s->kernel_width; kx > 0; kx--, seen += s->in_channels) {
            *at++ = seen;
        }
    }
}

// Of any window; (iy, ix) is where it begins, huge above and left of the image.
static void look(const int8_t **at, const int8_t *image, const struct window *s, size_t iy,
                 size_t ix, const int8_t *padding) {
    for (size_t ky = 0; ky < s->kernel_height; ky++) {
        for (size_t kx = 0; kx < s->kernel_width; kx++) {
            const int inside = iy + ky < s->in_height && ix + kx < s->in_width;
            const size_t pixel = (iy + ky) * s->in_width + ix + kx;
            *at++ = inside ? image + pixel * s->in_channels : padding;
        }
    }
}

void int8_depthwise(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b,
                    const struct window *s, int8_t zero, const struct int8_output *to, size_t n,
                    int8_t *scratch) {
    const size_t channels = s->in_channels, taps = (size_t)s->kernel_height * s->kernel_width;
    const size_t pitch = s->in_width * channels;
    const int8_t *at[INT8_TAPS];
    int8_fill(scratch, zero, channels);
    for (; n > 0; n--, x += s->in_height * pitch) {
        for (size_t oy = 0; oy < s->out_height; oy++) {
            const size_t iy = oy * s->stride_height - s->padding_height;
            const int rows = iy < s->in_height && iy + s->kernel_height <= s->in_height;
            int inside = 0; // at is that of a pixel of this row whose window is
            size_t from = 0;
            for (size_t ox = 0; ox < s->out_width; ox++, y += channels) {
                const size_t ix = ox * s->stride_width - s->padding_width;
                if (!rows || ix >= s->in_width || ix + s->kernel_width > s->in_width) {
                    look(at, x, s, iy, ix, scratch);
                    inside = 0;
                    from = 0;
                } else if (inside) {
                    from += s->stride_width * channels;
                } else {
                    look_inside(at, x + iy * pitch + ix * channels, s, pitch);
                    inside = 1;
                }
                int8_taps(y, at, from, taps, channels, w, b, to);
            }
        }
    }
}
