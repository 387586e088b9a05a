// patch.h: the three inner loops that convolutions and fully connected layers are made of.
//
// Four lanes of y (four output channels) share each element of x, so that it is loaded once for
// four multiply-adds, and the weights stay in registers. The last lanes of a number that is not a
// multiple of four come one by one.
#ifndef PATCH_H
#define PATCH_H

#include <stddef.h>

// Which elements of two tensors meet: height x width of them, the same in every lane.
struct patch {
    size_t height, width;
    size_t y_pitch, x_pitch; // elements from one row to the next
    size_t x_step;           // elements of x from one column to the next; those of y are dense
    size_t y_lane, w_lane;   // elements from one lane to the next
};

// Lanes to take at once when count are left: 4 or 1.
static inline size_t patch_lanes(size_t count) {
    return count >= 4 ? 4 : 1;
}

// y += w * x in each lane.
static inline void patch_spread(const struct patch *p, size_t lanes, float *y, const float *x,
                                const float *w) {
    if (lanes == 4) {
        const float w0 = w[0], w1 = w[p->w_lane], w2 = w[2 * p->w_lane], w3 = w[3 * p->w_lane];
        for (size_t row = 0; row < p->height; row++) {
            float *y0 = y + row * p->y_pitch, *y1 = y0 + p->y_lane;
            float *y2 = y1 + p->y_lane, *y3 = y2 + p->y_lane;
            const float *from = x + row * p->x_pitch;
            for (size_t i = 0; i < p->width; i++) {
                const float value = from[i * p->x_step];
                y0[i] += w0 * value;
                y1[i] += w1 * value;
                y2[i] += w2 * value;
                y3[i] += w3 * value;
            }
        }
    } else {
        const float w0 = w[0];
        for (size_t row = 0; row < p->height; row++) {
            float *to = y + row * p->y_pitch;
            const float *from = x + row * p->x_pitch;
            for (size_t i = 0; i < p->width; i++) {
                to[i] += w0 * from[i * p->x_step];
            }
        }
    }
}

// x += the sum over the lanes of w * y: what patch_spread does to x, backwards.
static inline void patch_gather(const struct patch *p, size_t lanes, float *x, const float *y,
                                const float *w) {
    if (lanes == 4) {
        const float w0 = w[0], w1 = w[p->w_lane], w2 = w[2 * p->w_lane], w3 = w[3 * p->w_lane];
        for (size_t row = 0; row < p->height; row++) {
            const float *y0 = y + row * p->y_pitch, *y1 = y0 + p->y_lane;
            const float *y2 = y1 + p->y_lane, *y3 = y2 + p->y_lane;
            float *to = x + row * p->x_pitch;
            for (size_t i = 0; i < p->width; i++) {
                to[i * p->x_step] += w0 * y0[i] + w1 * y1[i] + w2 * y2[i] + w3 * y3[i];
            }
        }
    } else {
        const float w0 = w[0];
        for (size_t row = 0; row < p->height; row++) {
            const float *from = y + row * p->y_pitch;
            float *to = x + row * p->x_pitch;
            for (size_t i = 0; i < p->width; i++) {
                to[i * p->x_step] += w0 * from[i];
            }
        }
    }
}

// w += the sum over the patch of y * x in each lane. Rows are summed on their own first: a sum of
// short sums loses less than one long sum.
static inline void patch_dot(const struct patch *p, size_t lanes, float *w, const float *y,
                             const float *x) {
    if (lanes == 4) {
        float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (size_t row = 0; row < p->height; row++) {
            const float *y0 = y + row * p->y_pitch, *y1 = y0 + p->y_lane;
            const float *y2 = y1 + p->y_lane, *y3 = y2 + p->y_lane;
            const float *from = x + row * p->x_pitch;
            float row0 = 0, row1 = 0, row2 = 0, row3 = 0;
            for (size_t i = 0; i < p->width; i++) {
                const float value = from[i * p->x_step];
                row0 += y0[i] * value;
                row1 += y1[i] * value;
                row2 += y2[i] * value;
                row3 += y3[i] * value;
            }
            sum0 += row0;
            sum1 += row1;
            sum2 += row2;
            sum3 += row3;
        }
        w[0] += sum0;
        w[p->w_lane] += sum1;
        w[2 * p->w_lane] += sum2;
        w[3 * p->w_lane] += sum3;
    } else {
        float sum = 0;
        for (size_t row = 0; row < p->height; row++) {
            const float *left = y + row * p->y_pitch, *right = x + row * p->x_pitch;
            float row0 = 0;
            for (size_t i = 0; i < p->width; i++) {
                row0 += left[i] * right[i * p->x_step];
            }
            sum += row0;
        }
        w[0] += sum;
    }
}

#endif
