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
        float center = sum(from, 0, members * area) * share;
        // The mean's own rounding, large where the mean is far from 0, is summed and taken out.
        center += sum(from, center, members * area) * share;
        // A second pass, since mean(x^2) - mean(x)^2 would cancel.
        const float variance = sum_squares(from, center, members * area) * share;
        mean[group] = center;
        rstd[group] = 1.0f / sqrtf(variance + epsilon);
        for (size_t c = 0; c < members; c++) {
            const float scale = w[first + c] * rstd[group], shift = b[first + c];
            for (size_t i = 0; i < area; i++) {
                to[c * area + i] = (from[c * area + i] - center) * scale + shift;
            }
        }
    }
}

void group_norm_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                         const float *w, const float *mean, const float *rstd, size_t channels,
                         size_t groups, size_t area, size_t n) {
    const size_t members = channels / groups;
    const float share = 1.0f / (float)(members * area);
    for (size_t group = 0; group < n * groups; group++) {
        const size_t first = group % groups * members, start = group * members * area;
        float level = 0, slope = 0; // means of w * dy and of w * dy * normalised x
        for (size_t c = 0; c < members; c++) {
            const float *from = dy + start + c * area;
            const float shift = sum(from, 0, area);
            const float scale =
                sum_products(x + start + c * area, mean[group], from, area) * rstd[group];
            db[first + c] += shift;
            dw[first + c] += scale;
            level += w[first + c] * shift * share;
            slope += w[first + c] * scale * share;
        }
        if (!dx) {
            continue;
        }
        // Moving x moves mean and rstd too: the gradient loses its part along 1 and along x.
        level *= rstd[group];
        slope *= rstd[group] * rstd[group];
        for (size_t c = 0; c < members; c++) {
            const float scale = w[first + c] * rstd[group];
            for (size_t i = start + c * area; i < start + (c + 1) * area; i++) {
                dx[i] += scale * dy[i] - level - slope * (x[i] - mean[group]);
            }
        }
    }
}
