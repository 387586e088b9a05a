// sum.h: the long sums of the norms.
//
// They are sums of sums over BLOCK elements: thousands may be added up, and a float loses part of
// everything that is added to a number much larger than it. Each is taken over four sums in turns,
// so that no addition waits for the one before it.
#ifndef SUM_H
#define SUM_H

#include <stddef.h>

#define BLOCK 64u

struct sums {
    float plain;    // of z - z0
    float products; // of (z - z0) * (x - x0)
};

static inline struct sums sums(const float *z, float z0, const float *x, float x0, size_t size) {
    struct sums total = {0, 0};
    while (size > 0) {
        float plain[4] = {0}, products[4] = {0};
        size_t left = size < BLOCK ? size : BLOCK;
        size -= left;
#pragma GCC unroll 1 // by more than the four
        for (; left >= 4; left -= 4, z += 4, x += 4) {
            for (size_t i = 0; i < 4; i++) {
                plain[i] += z[i] - z0;
                products[i] += (z[i] - z0) * (x[i] - x0);
            }
        }
#pragma GCC unroll 1
        for (; left > 0; left--, z++, x++) {
            plain[0] += *z - z0;
            products[0] += (*z - z0) * (*x - x0);
        }
        total.plain += (plain[0] + plain[1]) + (plain[2] + plain[3]);
        total.products += (products[0] + products[1]) + (products[2] + products[3]);
    }
    return total;
}

#endif
