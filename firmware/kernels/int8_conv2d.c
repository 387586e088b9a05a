// int8_conv2d.c: the convolution in 8 bits: gathers what a few pixels see, row by row of
// int8_rows.h.
#include "kernels/int8.h"
#include "kernels/int8_bytes.h" // copies
#include "kernels/int8_rows.h"  // the sums

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

// What the pixels of a group see of an image.
struct view {
    const struct window *s;
    size_t channels, row, size; // bytes of a pixel, of a row of a window, and of a window
    size_t pitch;               // bytes from a row of the image to the next
    size_t first, stop; // columns of the output whose windows do not leave the image sideways
    int8_t zero;
};

static struct view view_of(const struct window *s, size_t channels, size_t size, int8_t zero) {
    struct view v = {
        .s = s,
        .channels = channels,
        .row = s->kernel_width * channels,
        .size = size,
        .pitch = (size_t)s->in_width * s->in_channels,
        .zero = zero,
    };
    const size_t end = s->in_width + (size_t)s->padding_width;
    if (channels == s->in_channels && end >= s->kernel_width) {
        v.first = (s->padding_width + s->stride_width - 1u) / s->stride_width;
        v.stop = (end - s->kernel_width) / s->stride_width + 1;
    }
    return v;
}

// One row of a window whose columns first ... stop - 1 lie inside the image.
static void gather_row(int8_t *to, const int8_t *from, const struct view *v, size_t first,
                       size_t stop) {
    int8_fill(to, v->zero, first * v->channels);
    if (v->channels == v->s->in_channels) {
        int8_copy(to + first * v->channels, from, (stop - first) * v->channels);
    } else {
        for (size_t kx = first; kx < stop; kx++, from += v->s->in_channels) {
            int8_copy(to + kx * v->channels, from, v->channels);
        }
    }
    int8_fill(to + stop * v->channels, v->zero, v->row - stop * v->channels);
}

// What a pixel sees whose window begins at (top, left) of the padded image.
static void gather_edge(int8_t *to, const int8_t *image, const struct view *v, size_t top,
                        size_t left) {
    const struct window *s = v->s;
    const size_t end = s->in_width + (size_t)s->padding_width;
    const size_t stop = left < end ? least(end - left, s->kernel_width) : 0;
    const size_t first = left < s->padding_width ? least(s->padding_width - left, stop) : 0;
    for (size_t ky = 0; ky < s->kernel_height; ky++, to += v->row) {
        const size_t iy = top + ky - s->padding_height; // above the image this is huge
        if (iy < s->in_height && first < stop) {
            const size_t ix = left + first - s->padding_width;
            gather_row(to, image + iy * v->pitch + ix * s->in_channels, v, first, stop);
        } else {
            int8_fill(to, v->zero, v->row);
        }
    }
}

// What several neighbours see whose windows do not leave the image sideways, row by row.
static void gather_inside(int8_t *to, const int8_t *image, const struct view *v, size_t top,
                          size_t left, size_t pixels) {
    const struct window *s = v->s;
    const size_t step = s->stride_width * v->channels;
    for (size_t ky = 0; ky < s->kernel_height; ky++, to += v->row) {
        const size_t iy = top + ky - s->padding_height;
        int8_t *put = to;
        if (iy < s->in_height) {
            const size_t ix = left - s->padding_width;
            const int8_t *from = image + iy * v->pitch + ix * v->channels;
            int8_copy_all(put, v->size, from, step, v->row, pixels);
        } else {
            for (size_t i = pixels; i > 0; i--, put += v->size) {
                int8_fill(put, v->zero, v->row);
            }
        }
    }
}

// What the pixels from (oy, ox) on see, which are in one row of the output.
static void gather(int8_t *to, const int8_t *image, const struct view *v, size_t oy, size_t ox,
                   size_t pixels) {
    const struct window *s = v->s;
    const size_t top = oy * s->stride_height, end = ox + pixels;
    while (ox < end) {
        size_t some = 1;
        if (ox >= v->first && ox < v->stop) {
            some = least(v->stop, end) - ox;
            gather_inside(to, image, v, top, ox * s->stride_width, some);
        } else {
            gather_edge(to, image, v, top, ox * s->stride_width);
        }
        ox += some;
        to += some * v->size;
    }
}

// Whether what the pixels see lies there already, one behind the other.
static int is_matrix(const struct window *s, size_t groups) {
    return groups == 1 && s->kernel_height == 1 && s->kernel_width == 1 && s->stride_height == 1 &&
           s->stride_width == 1 && s->padding_height == 0 && s->padding_width == 0;
}

void int8_conv2d(int8_t *y, const int8_t *x, const int8_t *w, const int32_t *b,
                 const struct window *s, size_t groups, int8_t zero, const struct int8_output *to,
                 size_t n, int8_t *scratch) {
    const size_t channels = s->in_channels / groups, out = s->out_channels / groups;
    const size_t out_area = (size_t)s->out_height * s->out_width;
    struct int8_matrix m = {
        .w = w,
        .b = b,
        .size = (size_t)s->kernel_height * s->kernel_width * channels,
        .channels = out,
        .to = *to,
        .step = 1,
    };
    if (is_matrix(s, groups)) {
        int8_rows(y, out, x, n * out_area, &m);
        return;
    }
    const struct view v = view_of(s, channels, m.size, zero);
    const size_t most = int8_conv2d_scratch(s, groups) / m.size;
    for (size_t group = 0; group < groups; group++) {
        const int8_t *image = x + group * channels;
        int8_t *put = y + group * out;
        for (size_t sample = 0; sample < n; sample++) {
            size_t oy = 0, ox = 0;
            for (size_t left = out_area, rows; left > 0; left -= rows) {
                rows = least(most, left);
                for (size_t i = 0, some; i < rows; i += some) {
                    some = least(rows - i, s->out_width - ox);
                    gather(scratch + i * m.size, image, &v, oy, ox, some);
                    ox += some;
                    if (ox == s->out_width) {
                        ox = 0;
                        oy++;
                    }
                }
                int8_rows(put, s->out_channels, scratch, rows, &m);
                put += rows * s->out_channels;
            }
            image += (size_t)s->in_height * s->in_width * s->in_channels;
        }
        m.w += out * m.size;
        m.b += out;
        m.to.multiplier += out;
        m.to.shift += out;
    }
}
