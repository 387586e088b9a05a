// fast_check.c: a firmware that holds the fast kernels to the plain ones on chosen and random
// shapes, for the tests on boards.
//
// It writes a line for each tensor that disagrees and for each shape after which a float beside an
// array has changed, then how many shapes of each kernel it ran, then "end".
#include <math.h>
#include <string.h>

#include "bench/text.h"        // words and numbers
#include "core/port.h"         // link
#include "kernels/fast/fast.h" // what is checked
#include "kernels/kernels.h"   // what it is held to

#define WINDOWS 140 // every fourth is depthwise
#define LAYERS 50

// ---- what is written ----

static void write_count(const char *kernel, uint32_t count) {
    write_text(kernel);
    write_number(count);
    write_text("\n");
}

// ---- random numbers ----

static uint32_t below(uint32_t end) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u; // Numerical Recipes' generator
    return (state >> 8) % end;
}

static void fill(float *to, size_t size) {
    for (size_t i = 0; i < size; i++) {
        to[i] = (float)below(1u << 24) * (2.0f / 16777216.0f) - 1.0f;
    }
}

// ---- arrays, with NaNs on either side ----

#define POOL 100000 // floats
#define GUARD 16
#define ARRAYS 17 // of a layer; a window has 13

static float pool[POOL];
static size_t used;

static struct {
    const float *at;
    size_t size;
} arrays[ARRAYS];
static size_t array_count;

// A signalling NaN: it becomes a quiet one, with other bits, when something is added to it.
static const uint32_t nan_bits = 0x7FA5A5A5u;

static void clear(void) {
    for (size_t i = 0; i < POOL; i++) {
        memcpy(&pool[i], &nan_bits, sizeof pool[i]);
    }
    used = array_count = 0;
}

static float *unassigned(size_t size) {
    float *at = pool + used + GUARD;
    used += GUARD + size;
    arrays[array_count].at = at;
    arrays[array_count++].size = size;
    return at;
}

static float *randoms(size_t size) {
    float *at = unassigned(size);
    fill(at, size);
    return at;
}

static int guards_hold(void) {
    size_t changed = 0;
    for (size_t i = 0; i < array_count; i++) {
        for (size_t g = 0; g < GUARD; g++) {
            changed += memcmp(arrays[i].at - GUARD + g, &nan_bits, sizeof nan_bits) != 0;
            changed += memcmp(arrays[i].at + arrays[i].size + g, &nan_bits, sizeof nan_bits) != 0;
        }
    }
    return changed == 0;
}

// A tensor as the fast kernel makes it and as the plain one does.
struct tensor {
    const char *name;
    float *fast, *plain;
    size_t size;
};

static struct tensor result(const char *name, size_t size) {
    return (struct tensor){name, unassigned(size), unassigned(size), size};
}

// A gradient, to which a kernel adds, or weights; size 0 makes the pointers NULL.
static struct tensor sum(const char *name, size_t size) {
    struct tensor t = {.name = name, .size = size};
    if (size > 0) {
        t.fast = randoms(size);
        t.plain = unassigned(size);
        memcpy(t.plain, t.fast, size * sizeof *t.fast);
    }
    return t;
}

static int agrees(const struct tensor *t) {
    float largest = 0;
    for (size_t i = 0; i < t->size; i++) {
        largest = fmaxf(largest, fabsf(t->plain[i]));
    }
    size_t off = 0;
    for (size_t i = 0; i < t->size; i++) {
        // true for NaN too
        off += !(fabsf(t->fast[i] - t->plain[i]) <= 2e-5f * largest + 1e-6f);
    }
    return off == 0;
}

static void report(const char *kernel, const char *what, const uint32_t *shape, size_t count) {
    write_text(kernel);
    write_text(" ");
    write_text(what);
    for (size_t i = 0; i < count; i++) {
        write_number(shape[i]);
    }
    write_text("\n");
}

static void compare(const char *kernel, const struct tensor *tensors, size_t tensor_count,
                    const uint32_t *shape, size_t shape_count) {
    for (size_t i = 0; i < tensor_count; i++) {
        if (!agrees(&tensors[i])) {
            report(kernel, tensors[i].name, shape, shape_count);
        }
    }
    if (!guards_hold()) {
        report(kernel, "guard", shape, shape_count);
    }
    port_flush();
}

// ---- windows ----

#define DEPTHWISE 0 // in place of the output channels

// Corners of what the fast kernels compute.
static const struct corner {
    uint16_t in, height, width, out;
    uint8_t kernel, stride, padding;
} corners[] = {
    // one pixel; narrower than a tile; lanes and pixels that are no multiple of four
    {1, 1, 1, 1, 3, 1, 1},
    {5, 3, 1, 6, 3, 1, 1},
    {7, 2, 2, 9, 3, 1, 1},
    {5, 3, 3, 2, 3, 2, 1},
    {4, 5, 7, 3, 3, 1, 0},
    {3, 7, 9, 5, 3, 1, 2},
    {2, 4, 13, 7, 3, 1, 3},
    {6, 15, 16, 7, 3, 2, 0},
    {6, 9, 10, 7, 3, 2, 3},
    {9, 7, 9, 10, 3, 2, 1},
    // whole tiles
    {4, 8, 8, 8, 3, 1, 1},
    {4, 16, 16, 4, 3, 2, 1},
    // rows in several bands, channels in several pieces, as wide as fits, too wide
    {1, 100, 10, 1, 3, 1, 1},
    {20, 11, 18, 5, 3, 1, 1},
    {40, 11, 10, 30, 3, 2, 1},
    {2, 5, 330, 3, 3, 1, 1},
    {2, 5, 400, 3, 3, 1, 1},
    {2, 5, 301, 3, 3, 2, 1},
    // 1x1: a plane of less than a tile, and of one pixel more; channels in several pieces
    {3, 1, 3, 5, 1, 1, 0},
    {3, 1, 5, 5, 1, 1, 0},
    {2, 2, 2, 9, 1, 1, 0},
    {130, 5, 5, 31, 1, 1, 0},
    {70, 9, 9, 7, 1, 2, 0},
    {5, 8, 7, 6, 1, 2, 0},
    {3, 40, 65, 2, 1, 2, 0},
    // depthwise
    {1, 1, 1, DEPTHWISE, 3, 1, 1},
    {3, 3, 3, DEPTHWISE, 3, 1, 1},
    {5, 6, 7, DEPTHWISE, 3, 2, 1},
    {2, 9, 10, DEPTHWISE, 3, 2, 3},
    {2, 40, 30, DEPTHWISE, 3, 1, 1},
    {2, 41, 39, DEPTHWISE, 3, 2, 1},
    {2, 5, 330, DEPTHWISE, 3, 1, 1},
};
#define CORNERS (sizeof corners / sizeof corners[0])

static struct window corner_window(const struct corner *c) {
    return (struct window){
        .in_channels = c->in,
        .in_height = c->height,
        .in_width = c->width,
        .out_channels = c->out == DEPTHWISE ? c->in : c->out,
        .out_height = (uint16_t)((c->height + 2 * c->padding - c->kernel) / c->stride + 1),
        .out_width = (uint16_t)((c->width + 2 * c->padding - c->kernel) / c->stride + 1),
        .kernel_height = c->kernel,
        .kernel_width = c->kernel,
        .stride_height = c->stride,
        .stride_width = c->stride,
        .padding_height = c->padding,
        .padding_width = c->padding,
    };
}

// Mostly of kinds that the fast kernels compute, and small enough for the pool and the patience.
static struct window random_window(int depthwise) {
    for (;;) {
        const uint32_t in = 1 + below(below(3) ? 12 : 40), out = 1 + below(below(3) ? 12 : 40);
        const uint32_t height = 1 + below(18), width = 1 + below(below(4) ? 18 : 60);
        const uint32_t kernel = below(4) ? 3 : 1, stride = 1 + below(below(6) ? 2 : 3);
        const uint32_t top = below(2) ? kernel / 2 : below(4);
        const uint32_t left = below(2) ? kernel / 2 : below(4);
        if (height + 2 * top < kernel || width + 2 * left < kernel) {
            continue;
        }
        const struct window s = {
            .in_channels = (uint16_t)in,
            .in_height = (uint16_t)height,
            .in_width = (uint16_t)width,
            .out_channels = (uint16_t)(depthwise ? in : out),
            .out_height = (uint16_t)((height + 2 * top - kernel) / stride + 1),
            .out_width = (uint16_t)((width + 2 * left - kernel) / stride + 1),
            .kernel_height = (uint8_t)kernel,
            .kernel_width = (uint8_t)kernel,
            .stride_height = (uint8_t)stride,
            .stride_width = (uint8_t)stride,
            .padding_height = (uint8_t)top,
            .padding_width = (uint8_t)left,
        };
        const uint32_t sees = (depthwise ? 1 : in) * kernel * kernel;
        const uint32_t area = (uint32_t)s.out_height * s.out_width;
        if (s.out_channels * sees <= 5000 && in * height * width <= 6000 &&
            s.out_channels * area <= 6000 && s.out_channels * area * sees <= 200000) {
            return s;
        }
    }
}

// Each channel of the plain convolution on its own.
static void depthwise_plain(float *y, float *dx, float *dw, float *db, const float *dy,
                            const float *x, const float *w, const float *b, const struct window *s,
                            size_t n) {
    const struct window one = fast_depthwise_channel(s);
    const size_t in = (size_t)s->in_height * s->in_width;
    const size_t out = (size_t)s->out_height * s->out_width;
    const size_t taps = (size_t)s->kernel_height * s->kernel_width;
    for (size_t plane = 0; plane < n * s->in_channels; plane++) {
        const size_t c = plane % s->in_channels;
        conv2d_forward(y + plane * out, x + plane * in, w + c * taps, b + c, &one, 1);
        conv2d_backward(dx ? dx + plane * in : NULL, dw + c * taps, db + c, dy + plane * out,
                        x + plane * in, w + c * taps, &one, 1);
    }
}

static void check_window(struct window s, int depthwise) {
    clear();
    const size_t n = 1 + below(2), out = s.out_channels;
    const size_t x_size = n * s.in_channels * s.in_height * s.in_width;
    const size_t y_size = n * out * s.out_height * s.out_width;
    const size_t w_size = out * (depthwise ? 1 : s.in_channels) * s.kernel_height * s.kernel_width;
    const float *x = randoms(x_size), *w = randoms(w_size), *b = randoms(out);
    const float *dy = randoms(y_size);
    float *scratch = unassigned(depthwise ? fast_depthwise_scratch(&s) : fast_conv2d_scratch(&s));
    const struct tensor t[] = {result("y", y_size), sum("dx", below(4) ? x_size : 0),
                               sum("dw", w_size), sum("db", out)};
    if (depthwise) {
        depthwise_plain(t[0].plain, t[1].plain, t[2].plain, t[3].plain, dy, x, w, b, &s, n);
        fast_depthwise_forward(t[0].fast, x, w, b, &s, n, scratch);
        fast_depthwise_backward(t[1].fast, t[2].fast, t[3].fast, dy, x, w, &s, n, scratch);
    } else {
        conv2d_forward(t[0].plain, x, w, b, &s, n);
        conv2d_backward(t[1].plain, t[2].plain, t[3].plain, dy, x, w, &s, n);
        fast_conv2d_forward(t[0].fast, x, w, b, &s, n, scratch);
        fast_conv2d_backward(t[1].fast, t[2].fast, t[3].fast, dy, x, w, &s, n, scratch);
    }
    const uint32_t shape[] = {
        (uint32_t)n,    s.in_channels,  s.in_height,      s.in_width,      s.out_channels,
        s.kernel_width, s.stride_width, s.padding_height, s.padding_width,
    };
    compare(depthwise ? "depthwise" : "conv2d", t, 4, shape, sizeof shape / sizeof shape[0]);
}

// ---- linear layers, and a step of their weights ----

static void check_layer(void) {
    clear();
    const size_t in = 1 + below(70), out = 1 + below(40), n = 1 + below(2), w_size = in * out;
    const float *x = randoms(n * in), *w = randoms(w_size), *b = randoms(out);
    const float *dy = randoms(n * out), *g = randoms(w_size);
    const struct tensor t[] = {result("y", n * out),   sum("dx", below(4) ? n * in : 0),
                               sum("dw", w_size),      sum("db", out),
                               sum("stepped", w_size), sum("velocity", below(4) ? w_size : 0)};
    const float decay = below(2) ? 0.01f : 0.0f;
    linear_forward(t[0].plain, x, w, b, in, out, n);
    linear_backward(t[1].plain, t[2].plain, t[3].plain, dy, x, w, in, out, n);
    sgd_step(t[4].plain, t[5].plain, g, 0.1f, 0.9f, decay, w_size);
    fast_linear_forward(t[0].fast, x, w, b, in, out, n);
    fast_linear_backward(t[1].fast, t[2].fast, t[3].fast, dy, x, w, in, out, n);
    fast_sgd_step(t[4].fast, t[5].fast, g, 0.1f, 0.9f, decay, w_size);
    const uint32_t shape[] = {(uint32_t)n, (uint32_t)in, (uint32_t)out};
    compare("linear", t, 6, shape, 3);
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    for (size_t i = 0; i < CORNERS; i++) {
        check_window(corner_window(&corners[i]), corners[i].out == DEPTHWISE);
    }
    for (uint32_t i = 0; i < WINDOWS; i++) {
        const int depthwise = i % 4 == 3;
        check_window(random_window(depthwise), depthwise);
    }
    for (uint32_t i = 0; i < LAYERS; i++) {
        check_layer();
    }
    write_count("chosen windows", CORNERS);
    write_count("random windows", WINDOWS);
    write_count("layers", LAYERS);
    write_text("end\n");
    port_flush();
    uint8_t byte;
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
