// span.h: runs of neighbouring floats: filled, copied and summed, eight at a time.
#ifndef SPAN_H
#define SPAN_H

#include <stddef.h>

#include "kernels/fast/wide.h" // eight at a time

// The loops around the inner loops run seldom: they are compiled for size, whatever the flags.
#define SELDOM __attribute__((cold))

// The same for a short loop in a function that is compiled for speed.
#define ROLLED _Pragma("GCC unroll 1")

// v += factor * u, eight variables each.
#define SPAN_ADD8(v, factor, u)                                                                    \
    do {                                                                                           \
        v##0 += (factor)*u##0;                                                                     \
        v##1 += (factor)*u##1;                                                                     \
        v##2 += (factor)*u##2;                                                                     \
        v##3 += (factor)*u##3;                                                                     \
        v##4 += (factor)*u##4;                                                                     \
        v##5 += (factor)*u##5;                                                                     \
        v##6 += (factor)*u##6;                                                                     \
        v##7 += (factor)*u##7;                                                                     \
    } while (0)

static inline void span_fill(float *to, float value, size_t count) {
    SINGLES8(v, s0, s1, s2, s3, s4, s5, s6, s7);
    v0 = v1 = v2 = v3 = v4 = v5 = v6 = v7 = value;
    for (; count >= 8; count -= 8) {
        PUT8(to, v);
    }
    ROLLED for (; count > 0; count--) {
        PUT1(to, v);
    }
}

static inline void span_copy(float *to, const float *from, size_t count) {
    SINGLES8(v, s0, s1, s2, s3, s4, s5, s6, s7);
    for (; count >= 8; count -= 8) {
        TAKE8(v, from);
        PUT8(to, v);
    }
    if (count >= 4) {
        TAKE4(v, from);
        PUT4(to, v);
        count -= 4;
    }
    ROLLED for (; count > 0; count--) {
        TAKE1(v, from);
        PUT1(to, v);
    }
}

// Eight sums side by side lose less than one long sum.
static inline float span_sum(const float *from, size_t count) {
    SINGLES8(v, s0, s1, s2, s3, s4, s5, s6, s7);
    float sum[8] = {0};
    for (; count >= 8; count -= 8) {
        TAKE8(v, from);
        sum[0] += v0;
        sum[1] += v1;
        sum[2] += v2;
        sum[3] += v3;
        sum[4] += v4;
        sum[5] += v5;
        sum[6] += v6;
        sum[7] += v7;
    }
    ROLLED for (; count > 0; count--) {
        TAKE1(v, from);
        sum[0] += v0;
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

#endif
