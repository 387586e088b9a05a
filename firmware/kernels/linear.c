// linear.c: the fully connected layer: y = x W^T + b.
#include "kernels/kernels.h"
#include "kernels/patch.h" // the loops over the inputs

// Here a lane is one output's row of weights, and a patch is one such row: the loops are those of
// the convolution with w in the place of y (it is the long one) and y in the place of w.
static struct patch weight_row(size_t in) {
    return (struct patch){.height = 1, .width = in, .x_step = 1, .y_lane = in, .w_lane = 1};
}

void linear_forward(float *y, const float *x, const float *w, const float *b, size_t in, size_t out,
                    size_t n) {
    const struct patch row = weight_row(in);
    for (size_t sample = 0; sample < n; sample++, x += in, y += out) {
        size_t lanes;
        for (size_t o = 0; o < out; o += lanes) {
            lanes = patch_lanes(out - o);
            for (size_t lane = 0; lane < lanes; lane++) {
                y[o + lane] = b ? b[o + lane] : 0;
            }
            patch_dot(&row, lanes, y + o, w + o * in, x);
        }
    }
}

void linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                     const float *w, size_t in, size_t out, size_t n) {
    const struct patch row = weight_row(in);
    for (size_t sample = 0; sample < n; sample++, dy += out) {
        for (size_t o = 0; db && o < out; o++) {
            db[o] += dy[o];
        }
        size_t lanes;
        for (size_t o = 0; o < out; o += lanes) {
            lanes = patch_lanes(out - o);
            if (dw) {
                patch_spread(&row, lanes, dw + o * in, x + sample * in, dy + o);
            }
            if (dx) {
                patch_gather(&row, lanes, dx + sample * in, w + o * in, dy + o);
            }
        }
    }
}
