// kernels.c: a program that runs every kernel on a list of shapes and writes what each part took.
//
// splitee_host/bench.py builds it around a port and the kernels, runs it where virtual time counts
// instructions, and reads the lines:
//   kernel shape macs scratch_bytes forward dweight dinput update step step_without_dinput
// in microseconds times REPEATS; "end" is the last line.
#include <string.h>

#include "bench/shapes.h"      // layers and repeats
#include "bench/text.h"        // words and numbers
#include "core/port.h"         // clock and link
#include "kernels/fast/fast.h" // what is measured
#include "kernels/kernels.h"   // struct window

static float x[MAPS], dx[MAPS], y[MAPS], dy[MAPS];
static float w[WEIGHTS], dw[WEIGHTS], b[256], db[256], mean[256], rstd[256];
static float scratch[FAST_SCRATCH_MAX];

static void fill(float *to, size_t size) {
    static uint32_t state = 1;
    for (size_t i = 0; i < size; i++) {
        state = state * 1664525u + 1013904223u; // Numerical Recipes' generator
        to[i] = (float)(state >> 8) * (2.0f / 16777216.0f) - 1.0f;
    }
}

// What one layer of each kind does in a step, with or without a gradient of its input.
struct layer {
    const char *kernel, *shape;
    uint32_t macs;
    struct window window; // of a convolution; in_channels and out_channels of a linear layer
    size_t weights;
    size_t groups; // of a norm
};

static void forward(const struct layer *l) {
    const size_t area = (size_t)l->window.in_height * l->window.in_width;
    if (strcmp(l->kernel, "conv2d") == 0) {
        fast_conv2d_forward(y, x, w, b, &l->window, 1, scratch);
    } else if (strcmp(l->kernel, "depthwise") == 0) {
        fast_depthwise_forward(y, x, w, b, &l->window, 1, scratch);
    } else if (strcmp(l->kernel, "linear") == 0) {
        fast_linear_forward(y, x, w, b, l->window.in_channels, l->window.out_channels, 1);
    } else if (strcmp(l->kernel, "group_norm") == 0) {
        group_norm_forward(y, mean, rstd, x, w, b, l->window.in_channels, l->groups, area, 1e-5f,
                           1);
    } else if (strcmp(l->kernel, "batch_norm") == 0) {
        // the variance stands where group norm has 1 / deviation
        batch_norm_measure(mean, rstd, x, l->window.in_channels, area, 0, 1);
        batch_norm_forward(y, x, w, b, mean, rstd, l->window.in_channels, area, 1e-5f, 1);
    } else {
        relu_forward(y, x, l->window.in_channels * area);
    }
}

// The gradients of a layer's weights, or that of its input: two steps of a segment. A norm has one
// for both, which works in place.
static void backward(const struct layer *l, int input) {
    const size_t area = (size_t)l->window.in_height * l->window.in_width;
    float *const to = input ? dx : NULL, *const to_w = input ? NULL : dw;
    float *const to_b = input ? NULL : db;
    if (strcmp(l->kernel, "conv2d") == 0) {
        fast_conv2d_backward(to, to_w, to_b, dy, x, w, &l->window, 1, scratch);
    } else if (strcmp(l->kernel, "depthwise") == 0) {
        fast_depthwise_backward(to, to_w, to_b, dy, x, w, &l->window, 1, scratch);
    } else if (strcmp(l->kernel, "linear") == 0) {
        fast_linear_backward(to, to_w, to_b, dy, x, w, l->window.in_channels,
                             l->window.out_channels, 1);
    } else if (strcmp(l->kernel, "group_norm") == 0 && !input) {
        group_norm_backward(dy, dw, db, x, w, mean, rstd, l->window.in_channels, l->groups, area,
                            1);
    } else if (strcmp(l->kernel, "batch_norm") == 0 && !input) {
        batch_norm_backward(dy, dw, db, x, w, mean, rstd, l->window.in_channels, area, 1e-5f, 1);
    } else if (strcmp(l->kernel, "relu") == 0 && input) {
        relu_backward(dy, y, l->window.in_channels * area);
    }
}

static void update(const struct layer *l) {
    fast_sgd_step(w, NULL, dw, 0.0f, 0.0f, 0.0f, l->weights);
    fast_sgd_step(b, NULL, db, 0.0f, 0.0f, 0.0f, l->weights ? l->window.out_channels : 0);
}

// The parts of a step, as bits.
enum { FORWARD = 1, LEARN = 2, INPUT = 4, UPDATE = 8 };

static uint32_t measure(const struct layer *l, unsigned parts) {
    const uint32_t before = port_micros();
    for (int i = 0; i < REPEATS; i++) {
        if (parts & FORWARD) {
            forward(l);
        }
        if (parts & LEARN) {
            backward(l, 0);
        }
        if (parts & INPUT) {
            backward(l, 1);
        }
        if (parts & UPDATE) {
            update(l);
        }
    }
    return port_micros() - before;
}

static size_t scratch_size(const struct window *s, const char *kernel) {
    if (strcmp(kernel, "conv2d") == 0) {
        return fast_conv2d_scratch(s);
    }
    return strcmp(kernel, "depthwise") == 0 ? fast_depthwise_scratch(s) : 0;
}

static void report(const struct layer *l) {
    fill(x, MAPS);
    fill(dy, MAPS);
    fill(w, WEIGHTS);
    write_text(l->kernel);
    write_text(" ");
    write_text(l->shape);
    write_number(l->macs);
    write_number((uint32_t)(scratch_size(&l->window, l->kernel) * sizeof *scratch));
    write_number(measure(l, FORWARD));
    write_number(measure(l, LEARN));
    write_number(measure(l, INPUT));
    write_number(measure(l, UPDATE));
    write_number(measure(l, FORWARD | LEARN | INPUT | UPDATE));
    write_number(measure(l, FORWARD | LEARN | UPDATE));
    write_text("\n");
    port_flush();
}

#define CONV2D(in, out, size, k, s, name)                                                          \
    {                                                                                              \
        "conv2d", name, CONV2D_MACS(in, out, size, k, s), WINDOW(in, out, size, k, s),             \
            (in) * (out) * (k) * (k), 0                                                            \
    }
#define DEPTHWISE(channels, size, s, name)                                                         \
    {                                                                                              \
        "depthwise", name, DEPTHWISE_MACS(channels, size, s),                                      \
            WINDOW(channels, channels, size, 3, s), (channels)*9, 0                                \
    }
#define LINEAR(in, out, name)                                                                      \
    { "linear", name, (in) * (out), WINDOW(in, out, 1, 1, 1), (in) * (out), 0 }

static const struct layer layers[] = {
    CONV2D(3, 16, 32, 3, 1, "3x16x32x32k3"),
    CONV2D(16, 16, 16, 3, 1, "16x16x16x16k3"),
    CONV2D(1, 6, 8, 3, 1, "1x6x8x8k3"),
    CONV2D(16, 32, 16, 3, 2, "16x32x16x16k3s2"),
    CONV2D(32, 32, 8, 3, 1, "32x32x8x8k3"),
    CONV2D(16, 32, 16, 1, 1, "16x32x16x16k1"),
    CONV2D(32, 32, 8, 1, 1, "32x32x8x8k1"),
    CONV2D(16, 32, 16, 1, 2, "16x32x16x16k1s2"),
    DEPTHWISE(16, 32, 1, "16x32x32k3"),
    DEPTHWISE(16, 32, 2, "16x32x32k3s2"),
    LINEAR(256, 10, "256x10"),
    LINEAR(128, 64, "128x64"),
    {"group_norm", "16x16x16g4", 0, WINDOW(16, 16, 16, 1, 1), 16, 4},
    {"batch_norm", "16x16x16", 0, WINDOW(16, 16, 16, 1, 1), 16, 0},
    {"relu", "16x16x16", 0, WINDOW(16, 16, 16, 1, 1), 0, 0},
};

int main(int argc, char **argv) {
    port_init(argc, argv);
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
