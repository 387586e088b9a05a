// mve_view.c: view.c with vectors of four neighbouring pixels.
//
// What a pixel sees lies side by side with stride 1 only; else, and for less than four pixels, each
// lane has an address of its own. Lanes that are not there are the last pixel again.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/view.h"

// Four pixels see what `get` loads of a row of the band through three weights.
#define SEE(get, at, w0, w1, w2)                                                                   \
    do {                                                                                           \
        sum = vfmaq_n_f32(sum, get(at, 1), w1);                                                    \
        sum = vfmaq_n_f32(sum, get(at, 2), w2);                                                    \
        sum = vfmaq_n_f32(sum, get(at, 0), w0);                                                    \
    } while (0)

#define NEXT_TO(at, floats) vldrwq_f32((at) + (floats))

// Side by side, nine instructions for 36 multiply-adds come with 13 others.
void view_see(float *to, const float *weights, const struct view *v) {
    const size_t fours = v->stride == 1 ? v->width / 4 : 0;
    const float *band = v->band;
    const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3], w4 = weights[4],
                w5 = weights[5], w6 = weights[6], w7 = weights[7], w8 = weights[8];
    for (size_t row = v->rows; row > 0; row--, band += v->stride * v->pitch) {
        const float *from0 = band, *from1 = from0 + v->pitch, *from2 = from1 + v->pitch;
        for (size_t i = fours; i > 0; i--) {
            float32x4_t sum = vldrwq_f32(to);
            SEE(NEXT_TO, from0, w0, w1, w2);
            SEE(NEXT_TO, from1, w3, w4, w5);
            SEE(NEXT_TO, from2, w6, w7, w8);
            from0 += 4;
            from1 += 4;
            from2 += 4;
            VECTOR_PUT(to, sum);
        }
        for (size_t left = v->width - 4 * fours; left > 0;) {
            const size_t pixels = left < 4 ? left : 4;
            const uint32x4_t at0 = lanes_apart(from0, v->stride, pixels);
            const uint32x4_t at1 = lanes_apart(from1, v->stride, pixels);
            const uint32x4_t at2 = lanes_apart(from2, v->stride, pixels);
            const uint32x4_t put = lanes_apart(to, 1, pixels);
            float32x4_t sum = LANES_GET(put, 0);
            SEE(LANES_GET, at0, w0, w1, w2);
            SEE(LANES_GET, at1, w3, w4, w5);
            SEE(LANES_GET, at2, w6, w7, w8);
            LANES_PUT(put, 0, sum);
            from0 += 4 * v->stride;
            from1 += 4 * v->stride;
            from2 += 4 * v->stride;
            to += pixels;
            left -= pixels;
        }
    }
}

// A row of the kernel at a time, down strips of four pixels.
void view_weigh(float *dw, const float *dy, const struct view *v) {
    const float *first = v->band;
    for (size_t ky = 0; ky < 3; ky++, first += v->pitch, dw += 3) {
        float32x4_t a = vdupq_n_f32(0), b = a, c = a;
        for (size_t x = 0; x < v->width; x += 4) {
            const size_t left = v->width - x;
            const mve_pred16_t pixels = vctp32q(left);
            const float *g = dy + x, *from = first + x * v->stride;
            uint32x4_t at = lanes_apart(from, v->stride, left);
            for (size_t row = v->rows; row > 0; row--, g += v->width) {
                // no gradient in the lanes that are not there
                const float32x4_t gradients = vldrwq_z_f32(g, pixels);
                a = vfmaq_f32(a, gradients, LANES_GET(at, 0));
                b = vfmaq_f32(b, gradients, LANES_GET(at, 1));
                c = vfmaq_f32(c, gradients, LANES_GET(at, 2));
                LANES_MOVE(at, v->stride * v->pitch);
            }
        }
        dw[0] += vector_sum(a);
        dw[1] += vector_sum(b);
        dw[2] += vector_sum(c);
    }
}

#endif // MVE
