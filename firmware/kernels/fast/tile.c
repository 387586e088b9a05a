// tile.c: a row of any width by tiles of four lanes and four pixels.
#include "kernels/fast/tile.h"

#include "kernels/fast/span.h" // ROLLED

void tile_row(const struct tiles *tiles, const struct tile_row *row, tile_kernel *kernel) {
    struct tiles t = *tiles;
    size_t x = 0;
    if (row->step == 1) {
        for (size_t i = 0; i < 4; i++) {
            // A lane that is not there is computed like the last one, and stores the same.
            t.to[i] = row->to + tile_lane(i, row->lanes) * row->plane;
        }
        t.count = row->width / 4;
        kernel(&t);
        x = 4 * t.count;
    }
    for (; x < row->width; x += 4) {
        const size_t left = row->width - x < 4 ? row->width - x : 4;
        // Without padding the last tile begins early, with pixels that were there before.
        const size_t early = row->padded ? 0 : 4 - left;
        float aside[16] = {0};
        ROLLED for (size_t i = 0; i < 4; i++) {
            t.to[i] = aside + 4 * i;
        }
        t.from = tiles->from + (x - early) * t.advance / 4;
        t.count = 1;
        kernel(&t);
        ROLLED for (size_t lane = 0; lane < row->lanes; lane++) {
            float *to = row->to + lane * row->plane + x * row->step;
            const float *from = aside + 4 * lane + early;
            ROLLED for (size_t i = left; i > 0; i--, to += row->step) {
                *to += *from++;
            }
        }
    }
}
