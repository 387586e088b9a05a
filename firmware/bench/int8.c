// int8.c: a program that measures every kernel of inference in 8 bits at fixed shapes and writes
// what each took.
//
// splitee_host/bench.py builds it around a port and the kernels, runs it where virtual time counts
// instructions, and reads the lines:
//   kernel shape macs scratch_bytes instructions
// in microseconds times REPEATS; "end" is the last line.
#include <string.h>

#include "bench/shapes.h" // layers and repeats
#include "bench/text.h"   // words and numbers
#include "core/port.h"    // clock and link
#include "kernels/int8.h" // what is measured

#define CHANNELS 64

static int8_t x[MAPS], y[MAPS], w[WEIGHTS], shift[CHANNELS];
static _Alignas(int32_t) int8_t scratch[INT8_SCRATCH_MAX];
static int32_t b[CHANNELS], multiplier[CHANNELS];
static float ones[CHANNELS];
static const struct int8_norm norm = {
    1 << 30, 1 << 30, -4, -12, 0.25f, 8.0f, b, ones, ones, ones,
};
static const struct int8_output to = {multiplier, shift, -5, -128, 127};

static void fill(int8_t *into, size_t size) {
    static uint32_t state = 1;
    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u; // Numerical Recipes' generator
        into[i] = (int8_t)(state >> 24);
    }
}

struct layer {
    const char *kernel, *shape;
    uint32_t macs;
    struct window window; // in_channels and out_channels of a linear layer
};

static void forward(const struct layer *l) {
    const struct window *s = &l->window;
    const size_t area = (size_t)s->in_height * s->in_width;
    const struct int8_addend addend = {1 << 30, -1, 3};
    if (strcmp(l->kernel, "conv2d") == 0) {
        int8_conv2d(y, x, w, b, s, 1, 3, &to, 1, scratch);
    } else if (strcmp(l->kernel, "depthwise") == 0) {
        int8_depthwise(y, x, w, b, s, 3, &to, 1, scratch);
    } else if (strcmp(l->kernel, "linear") == 0) {
        int8_linear(y, x, w, b, s->in_channels, s->out_channels, &to, 1);
    } else if (strcmp(l->kernel, "add") == 0) {
        int8_add(y, x, &addend, x, &addend, &to, area * s->in_channels);
    } else if (strcmp(l->kernel, "rescale") == 0) {
        int8_rescale(y, x, 3, &to, area * s->in_channels);
    } else if (strcmp(l->kernel, "mean") == 0) {
        int8_mean(y, x, s->in_channels, area, 3, &to, 1);
    } else if (strcmp(l->kernel, "group_norm") == 0) {
        int8_group_norm(y, x, &norm, s->in_channels, 4, area, &to, 1, (int32_t *)scratch);
    } else if (strcmp(l->kernel, "max_pool") == 0) {
        int8_max_pool(y, x, s, 1);
    } else {
        int8_avg_pool(y, x, s, 3, 1);
    }
}

static uint32_t measure(const struct layer *l) {
    const uint32_t before = port_micros();
    for (int i = 0; i < REPEATS; i++) {
        forward(l);
    }
    return port_micros() - before;
}

static size_t scratch_size(const struct layer *l) {
    if (strcmp(l->kernel, "conv2d") == 0) {
        return int8_conv2d_scratch(&l->window, 1);
    }
    if (strcmp(l->kernel, "group_norm") == 0) {
        return INT8_NORM_SCRATCH(l->window.in_channels);
    }
    return strcmp(l->kernel, "depthwise") == 0 ? l->window.in_channels : 0;
}

static void report(const struct layer *l) {
    write_text(l->kernel);
    write_text(" ");
    write_text(l->shape);
    write_number(l->macs);
    write_number((uint32_t)scratch_size(l));
    write_number(measure(l));
    write_text("\n");
    port_flush();
}

#define CONV2D(in, out, size, k, s, name)                                                          \
    { "conv2d", name, CONV2D_MACS(in, out, size, k, s), WINDOW(in, out, size, k, s) }
#define DEPTHWISE(channels, size, s, name)                                                         \
    { "depthwise", name, DEPTHWISE_MACS(channels, size, s), WINDOW(channels, channels, size, 3, s) }
#define LINEAR(in, out, name)                                                                      \
    { "linear", name, (in) * (out), WINDOW(in, out, 1, 1, 1) }

static const struct layer layers[] = {
    CONV2D(3, 16, 32, 3, 1, "3x16x32x32k3"),
    CONV2D(16, 16, 16, 3, 1, "16x16x16x16k3"),
    CONV2D(16, 32, 16, 3, 2, "16x32x16x16k3s2"),
    CONV2D(32, 32, 8, 3, 1, "32x32x8x8k3"),
    CONV2D(16, 32, 16, 1, 1, "16x32x16x16k1"),
    CONV2D(32, 32, 8, 1, 1, "32x32x8x8k1"),
    CONV2D(16, 32, 16, 1, 2, "16x32x16x16k1s2"),
    DEPTHWISE(16, 32, 1, "16x32x32k3"),
    DEPTHWISE(16, 32, 2, "16x32x32k3s2"),
    LINEAR(256, 10, "256x10"),
    LINEAR(128, 64, "128x64"),
    {"add", "16x16x16", 0, WINDOW(16, 16, 16, 1, 1)},
    {"rescale", "16x16x16", 0, WINDOW(16, 16, 16, 1, 1)},
    {"group_norm", "16x16x16", 0, WINDOW(16, 16, 16, 1, 1)},
    {"mean", "64x8x8", 0, WINDOW(64, 64, 8, 1, 1)},
    {"max_pool", "16x16x16k2s2", 0, {16, 16, 16, 16, 8, 8, 2, 2, 2, 2, 0, 0}},
    {"avg_pool", "16x16x16k2s2", 0, {16, 16, 16, 16, 8, 8, 2, 2, 2, 2, 0, 0}},
};

int main(int argc, char **argv) {
    port_init(argc, argv);
    fill(x, MAPS);
    fill(w, WEIGHTS);
    for (size_t i = 0; i < CHANNELS; i++) {
        multiplier[i] = (1 << 30) + (int32_t)(i << 23);
        shift[i] = -9;
        ones[i] = 1.0f;
    }
    for (size_t i = 0; i < sizeof layers / sizeof layers[0]; i++) {
        report(&layers[i]);
    }
    write_text("end\n");
    port_flush();
    uint8_t byte;
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
