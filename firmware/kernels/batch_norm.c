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
        float rough = 0, rest = 0, squares = 0;
        for (size_t i = 0; i < n; i++) {
            rough += sums(x + i * size, 0, x + i * size, 0, area).plain * share;
        }
        // The mean's own rounding, large where the mean is far from 0, is summed and taken out. The
        // variance is of distances from it, since mean(x^2) - mean(x)^2 would cancel.
        for (size_t i = 0; i < n; i++) {
            const struct sums around = sums(x + i * size, rough, x + i * size, rough, area);
            rest += around.plain * share;
            squares += around.products * share;
        }
        const float center = rough + rest, spread = squares - rest * rest;
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

// The sums of dy and of dy * normalised x over a channel, which are its parts of db and dw.
static struct sums shift_and_scale(const float *d, const float *x, float mean, float rstd,
                                   size_t step, size_t area, size_t n) {
    struct sums total = {0, 0};
    for (size_t i = 0; i < n; i++) {
        const struct sums s = sums(d + i * step, 0, x + i * step, mean, area);
        total.plain += s.plain;
        total.products += s.products * rstd;
    }
    return total;
}

void batch_norm_backward(float *d, float *dw, float *db, const float *x, const float *w,
                         const float *mean, const float *variance, size_t channels, size_t area,
                         float epsilon, size_t n) {
    const size_t size = channels * area; // of one sample
    const float share = 1.0f / (float)(n * area);
    for (size_t c = 0; c < channels; c++, d += area, x += area) {
        const float center = mean[c], rstd = 1.0f / sqrtf(variance[c] + epsilon);
        const struct sums s = shift_and_scale(d, x, center, rstd, size, area, n);
        db[c] += s.plain;
        dw[c] += s.products;
        // Moving x moves mean and variance too: the gradient loses its part along 1 and along x.
        const float gain = w[c] * rstd;
        const float level = s.plain * share, slope = s.products * share * rstd;
        for (size_t sample = 0; sample < n; sample++) {
            for (size_t i = sample * size; i < sample * size + area; i++) {
                d[i] = gain * (d[i] - level - slope * (x[i] - center));
            }
        }
    }
}

void batch_norm_frozen_backward(float *d, float *dw, float *db, const float *x, const float *w,
                                const float *mean, const float *variance, size_t channels,
                                size_t area, float epsilon, size_t n) {
    const size_t size = channels * area;
    for (size_t c = 0; c < channels; c++, d += area, x += area) {
        const float rstd = 1.0f / sqrtf(variance[c] + epsilon);
        const struct sums s = shift_and_scale(d, x, mean[c], rstd, size, area, n);
        db[c] += s.plain;
        dw[c] += s.products;
        const float gain = w[c] * rstd;
        for (size_t sample = 0; sample < n; sample++) {
            for (size_t i = sample * size; i < sample * size + area; i++) {
                d[i] *= gain;
            }
        }
    }
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
