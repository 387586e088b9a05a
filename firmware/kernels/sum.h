// sum.h: the long sums of the norms.
//
// They are sums of sums over BLOCK elements: thousands may be added up, and a float loses part of
// everything that is added to a number much larger than it.
#ifndef SUM_H
#define SUM_H

#include <stddef.h>

#define BLOCK 64u

static inline size_t block_stop(size_t start, size_t size) {
    return size - start < BLOCK ? size : start + BLOCK;
}

// The sum of x - from.
static inline float sum(const float *x, float from, size_t size) {
    float total = 0;
    for (size_t i = 0; i < size;) {
        float part = 0;
        for (const size_t stop = block_stop(i, size); i < stop; i++) {
            part += x[i] - from;
        }
        total += part;
    }
    return total;
}

// The sum of (x - from)^2.
static inline float sum_squares(const float *x, float from, size_t size) {
    float total = 0;
    for (size_t i = 0; i < size;) {
        float part = 0;
        for (const size_t stop = block_stop(i, size); i < stop; i++) {
            const float distance = x[i] - from;
            part += distance * distance;
        }
        total += part;
    }
    return total;
}

// The sum of (x - from) * z.
static inline float sum_products(const float *x, float from, const float *z, size_t size) {
    float total = 0;
    for (size_t i = 0; i < size;) {
        float part = 0;
        for (const size_t stop = block_stop(i, size); i < stop; i++) {
            part += (x[i] - from) * z[i];
        }
        total += part;
    }
    return total;
}

#endif
