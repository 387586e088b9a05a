// elementwise.c: what is done to each element on its own.
#include "kernels/kernels.h"

void relu_forward(float *y, const float *x, size_t size) {
    for (size_t i = 0; i < size; i++) {
        y[i] = x[i] > 0 ? x[i] : 0;
    }
}

void relu_backward(float *dx, const float *dy, const float *y, size_t size) {
    for (size_t i = 0; i < size; i++) {
        dx[i] += y[i] > 0 ? dy[i] : 0;
    }
}

void relu6_forward(float *y, const float *x, size_t size) {
    for (size_t i = 0; i < size; i++) {
        const float positive = x[i] > 0 ? x[i] : 0;
        y[i] = positive < 6 ? positive : 6;
    }
}

void relu6_backward(float *dx, const float *dy, const float *y, size_t size) {
    for (size_t i = 0; i < size; i++) {
        dx[i] += y[i] > 0 && y[i] < 6 ? dy[i] : 0;
    }
}

void add_forward(float *y, const float *a, const float *b, size_t size) {
    for (size_t i = 0; i < size; i++) {
        y[i] = a[i] + b[i];
    }
}

static void accumulate(float *to, const float *from, size_t size) {
    for (size_t i = 0; i < size; i++) {
        to[i] += from[i];
    }
}

void add_backward(float *da, float *db, const float *dy, size_t size) {
    // One after the other, so that x + x (da is db) gets its gradient twice.
    if (da) {
        accumulate(da, dy, size);
    }
    if (db) {
        accumulate(db, dy, size);
    }
}

void branch_backward(float *dx, const float *dy, float weight, size_t size) {
    if (weight == 0) {
        return; // not even 0 * NaN of an exit that is detached
    }
    for (size_t i = 0; i < size; i++) {
        dx[i] += weight * dy[i];
    }
}

void gradient_weigh(float *g, float weight, size_t size) {
    for (size_t i = 0; i < size; i++) {
        g[i] = weight == 0 ? 0 : weight * g[i]; // 0 * NaN would stay NaN
    }
}

void normalize_forward(float *y, const uint8_t *images, const float *scale, const float *shift,
                       size_t channels, size_t area, size_t n) {
    // Upwards: image bytes at the end of y are then read before the float that covers them is
    // written (float i ends at byte 4i + 3, byte i + 1 lies at 3 * size + i + 1).
    for (size_t plane = 0; plane < n * channels; plane++) {
        const float slope = scale[plane % channels], start = shift[plane % channels];
        for (size_t i = plane * area; i < (plane + 1) * area; i++) {
            y[i] = (float)images[i] * slope + start;
        }
    }
}
