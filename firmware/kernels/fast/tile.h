// tile.h: four lanes (channels of a result) of four neighbouring pixels, which stay in registers
// while all that they are sums of goes by: the unit that the fast convolutions compute in.
#ifndef TILE_H
#define TILE_H

#include <stddef.h>

#include "kernels/fast/wide.h" // registers by name

// A row of tiles, and what they are sums of.
struct tiles {
    float *to[4]; // the first pixel in each lane
    size_t count;
    const float *from;   // what the first tap of the first pixel sees
    size_t advance;      // floats of `from` from a tile to the next
    size_t pitch, plane; // floats of `from` from a row, from a channel to the next
    size_t channels;     // of `from`
    const float *w[4];   // the first tap in each lane
    size_t w_step;       // floats of w from a channel of `from` to the next
};

// Adds to the tiles, which may be the same in two lanes if their weights are.
typedef void tile_kernel(const struct tiles *t);

// A row of any width in one to four lanes.
struct tile_row {
    float *to;
    size_t plane, step; // floats from a lane, from a pixel to the next
    size_t lanes, width;
    int padded; // whether there is something to see behind the last pixel, up to a whole tile
};

// Runs the kernel over a row; all of t but `to` and `count` is given. What the kernel cannot store
// itself, because it is no whole tile or does not lie side by side, it computes aside. Without
// padding the width is at least 4.
void tile_row(const struct tiles *t, const struct tile_row *row, tile_kernel *kernel);

// The lane to compute in place of lane i where there is none: the last one again.
static inline size_t tile_lane(size_t i, size_t lanes) {
    return i < lanes ? i : lanes - 1;
}

// Lanes a, b, c and d; s16 to s31 are left for others.
#define TILE                                                                                       \
    SINGLES4(a, s0, s1, s2, s3);                                                                   \
    SINGLES4(b, s4, s5, s6, s7);                                                                   \
    SINGLES4(c, s8, s9, s10, s11);                                                                 \
    SINGLES4(d, s12, s13, s14, s15)

// The place in each lane: PUT_TILE moves it on.
#define TILE_PLACES float *to0 = t->to[0], *to1 = t->to[1], *to2 = t->to[2], *to3 = t->to[3]

#define LOAD_TILE                                                                                  \
    do {                                                                                           \
        LOAD4(a, to0);                                                                             \
        LOAD4(b, to1);                                                                             \
        LOAD4(c, to2);                                                                             \
        LOAD4(d, to3);                                                                             \
    } while (0)

#define PUT_TILE                                                                                   \
    do {                                                                                           \
        PUT4(to0, a);                                                                              \
        PUT4(to1, b);                                                                              \
        PUT4(to2, c);                                                                              \
        PUT4(to3, d);                                                                              \
    } while (0)

// One weight in one lane: each of its pixels sees one of p0 ... p3.
#define TAP(a, g, p0, p1, p2, p3)                                                                  \
    do {                                                                                           \
        a##0 += (g) * (p0);                                                                        \
        a##1 += (g) * (p1);                                                                        \
        a##2 += (g) * (p2);                                                                        \
        a##3 += (g) * (p3);                                                                        \
    } while (0)

#endif
