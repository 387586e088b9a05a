// batch_norm.c: batch normalisation: y = (x - mean) * rstd * w + b, with the statistics of a
// channel.
#include "kernels/kernels.h"

#include <math.h>

#include "kernels/sum.h" // sums over a channel's image

void batch_norm_measure(float *mean, float *variance, const float *x, size_t channels, size_t area,
                        size_t seen, size_t n) {
    const size_t size = channels * area; // of one sample
    const float share = 1.0f / (float)(n * area);
    for (size_t c = 0; c < channels; c++, x += area) {
        float center = 0, rest = 0, spread = 0;
        for (size_t i = 0; i < n; i++) {
            center += sum(x + i * size, 0, area) * share;
        }
        // The mean's own rounding, large where the mean is far from 0, is summed and taken out.
        for (size_t i = 0; i < n; i++) {
            rest += sum(x + i * size, center, area) * share;
        }
        center += rest;
        for (size_t i = 0; i < n; i++) {
            spread += sum_squares(x + i * size, center, area) * share;
        }
        if (seen == 0) {
            mean[c] = center;
            variance[c] = spread;
        } else {
            // After Chan et al., "Updating formulae and a pairwise algorithm for computing sample
            // variances", 1979: no mean of squares, which would cancel.
            const float fresh = (float)n / (float)(seen + n), distance = center - mean[c];
            mean[c] += fresh * distance;
            variance[c] += fresh * (spread - variance[c]);
            variance[c] += fresh * (1 - fresh) * distance * distance;
        }
    }
}

void batch_norm_forward(float *y, const float *x, const float *w, const float *b, const float *mean,
                        const float *variance, size_t channels, size_t area, float epsilon,
                        size_t n) {
    for (size_t plane = 0; plane < n * channels; plane++) {
        const size_t c = plane % channels;
        const float center = mean[c], shift = b[c];
        const float scale = w[c] / sqrtf(variance[c] + epsilon);
        for (size_t i = plane * area; i < (plane + 1) * area; i++) {
            y[i] = (x[i] - center) * scale + shift;
        }
    }
}

// moving: whether mean and variance are those of x, so that moving x moves them too.
static void backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                     const float *w, const float *mean, const float *variance, size_t channels,
                     size_t area, float epsilon, size_t n, int moving) {
    const float share = 1.0f / (float)(n * area);
    for (size_t c = 0; c < channels; c++) {
        const float rstd = 1.0f / sqrtf(variance[c] + epsilon);
        float shift = 0, scale = 0; // sums of dy and of dy * normalised x
        for (size_t plane = c; plane < n * channels; plane += channels) {
            shift += sum(dy + plane * area, 0, area);
            scale += sum_products(x + plane * area, mean[c], dy + plane * area, area) * rstd;
        }
        db[c] += shift;
        dw[c] += scale;
        if (!dx) {
            continue;
        }
        // The gradient then loses its part along 1 and along x.
        const float level = moving ? shift * share : 0;
        const float slope = moving ? scale * share * rstd : 0;
        for (size_t plane = c; plane < n * channels; plane += channels) {
            for (size_t i = plane * area; i < (plane + 1) * area; i++) {
                dx[i] += w[c] * rstd * (dy[i] - level - slope * (x[i] - mean[c]));
            }
        }
    }
}

void batch_norm_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                         const float *w, const float *mean, const float *variance, size_t channels,
                         size_t area, float epsilon, size_t n) {
    backward(dx, dw, db, dy, x, w, mean, variance, channels, area, epsilon, n, 1);
}

void batch_norm_frozen_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                                const float *w, const float *mean, const float *variance,
                                size_t channels, size_t area, float epsilon, size_t n) {
    backward(dx, dw, db, dy, x, w, mean, variance, channels, area, epsilon, n, 0);
}

void batch_norm_follow(float *running_mean, float *running_variance, const float *mean,
                       const float *variance, size_t channels, size_t size, float momentum) {
    // One element says nothing of a variance: the running one then stays as it is.
    const float unbiased = size > 1 ? (float)size / (float)(size - 1) : 1;
    const float step = size > 1 ? momentum : 0;
    for (size_t c = 0; c < channels; c++) {
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_variance[c] += step * (variance[c] * unbiased - running_variance[c]);
    }
}
