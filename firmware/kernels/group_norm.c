// group_norm.c: group normalisation: y = (x - mean) * rstd * w + b, with the statistics of a group.
#include "kernels/kernels.h"

#include <math.h>

#include "kernels/sum.h" // sums over a group

void group_norm_forward(float *y, float *mean, float *rstd, const float *x, const float *w,
                        const float *b, size_t channels, size_t groups, size_t area, float epsilon,
                        size_t n) {
    const size_t members = channels / groups; // channels of one group
    const float share = 1.0f / (float)(members * area);
    for (size_t group = 0; group < n * groups; group++) {
        const size_t first = group % groups * members;
        const float *from = x + group * members * area;
        float *to = y + group * members * area;
        // The mean's own rounding, large where the mean is far from 0, is summed and taken out. The
        // variance is of distances from it, since mean(x^2) - mean(x)^2 would cancel.
        const float rough = sums(from, 0, from, 0, members * area).plain * share;
        const struct sums around = sums(from, rough, from, rough, members * area);
        const float rest = around.plain * share, center = rough + rest;
        const float r = 1.0f / sqrtf(around.products * share - rest * rest + epsilon);
        mean[group] = center;
        rstd[group] = r;
        for (size_t c = 0; c < members; c++) {
            const float scale = w[first + c] * r, shift = b[first + c];
            for (size_t i = c * area; i < (c + 1) * area; i++) {
                to[i] = (from[i] - center) * scale + shift;
            }
        }
    }
}

void group_norm_backward(float *d, float *dw, float *db, const float *x, const float *w,
                         const float *mean, const float *rstd, size_t channels, size_t groups,
                         size_t area, size_t n) {
    const size_t members = channels / groups;
    const float share = 1.0f / (float)(members * area);
    for (size_t group = 0; group < n * groups; group++) {
        const size_t first = group % groups * members, start = group * members * area;
        const float center = mean[group], r = rstd[group];
        float level = 0, slope = 0; // means of w * dy and of w * dy * normalised x
        for (size_t c = 0; c < members; c++) {
            const struct sums s = sums(d + start + c * area, 0, x + start + c * area, center, area);
            const float shift = s.plain, scale = s.products * r;
            db[first + c] += shift;
            dw[first + c] += scale;
            level += w[first + c] * shift * share;
            slope += w[first + c] * scale * share;
        }
        // Moving x moves mean and rstd too: the gradient loses its part along 1 and along x.
        level *= r;
        slope *= r * r;
        for (size_t c = 0; c < members; c++) {
            const float scale = w[first + c] * r;
            for (size_t i = start + c * area; i < start + (c + 1) * area; i++) {
                d[i] = scale * d[i] - level - slope * (x[i] - center);
            }
        }
    }
}
