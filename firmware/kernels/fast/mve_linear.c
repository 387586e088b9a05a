// mve_linear.c: linear.c with vectors: four outputs by four inputs at a time.
//
// Where there are less than four outputs left, the last one stands for those that are not there; of
// the last inputs, the lanes beyond the last one are zero.
#include "kernels/fast/mve.h"

#if MVE

#include "kernels/fast/fast.h"
#include "kernels/fast/tile.h" // tile_lane

// Arrays of four are registers, once a loop over them is unrolled.
#define EACH _Pragma("GCC unroll 4") for (size_t i = 0; i < 4; i++)

// The product of x with four rows of w.
static void dots(float *product, const float *x, const float *const *w, size_t in) {
    const float *from[4];
    float32x4_t sum[4];
    EACH {
        from[i] = w[i];
        sum[i] = vdupq_n_f32(0);
    }
    for (size_t four = in / 4; four > 0; four--) {
        float32x4_t inputs, weights;
        VECTOR_TAKE(inputs, x);
        EACH {
            VECTOR_TAKE(weights, from[i]);
            sum[i] = vfmaq_f32(sum[i], inputs, weights);
        }
    }
    const mve_pred16_t rest = vctp32q(in % 4);
    const float32x4_t inputs = vldrwq_z_f32(x, rest);
    EACH {
        sum[i] = vfmaq_f32(sum[i], inputs, vldrwq_z_f32(from[i], rest));
        product[i] = vector_sum(sum[i]);
    }
}

void fast_linear_forward(float *y, const float *x, const float *w, const float *b, size_t in,
                         size_t out, size_t n) {
    for (; n > 0; n--, x += in, y += out) {
        for (size_t o = 0; o < out; o += 4) {
            const size_t rows = out - o;
            const float *from[4];
            float product[4];
            for (size_t i = 0; i < 4; i++) {
                from[i] = w + (o + tile_lane(i, rows)) * in;
            }
            dots(product, x, from, in);
            for (size_t i = 0; i < 4 && i < rows; i++) {
                y[o + i] = b ? b[o + i] + product[i] : product[i];
            }
        }
    }
}

// Four rows of dw, each += its g x.
static void outer(float *const *dw, const float *dy, const float *x, size_t in) {
    float *to[4], g[4];
    EACH {
        to[i] = dw[i];
        g[i] = dy[i];
    }
    for (size_t four = in / 4; four > 0; four--) {
        float32x4_t inputs;
        VECTOR_TAKE(inputs, x);
        EACH {
            VECTOR_PUT(to[i], vfmaq_n_f32(vldrwq_f32(to[i]), inputs, g[i]));
        }
    }
    const mve_pred16_t rest = vctp32q(in % 4);
    const float32x4_t inputs = vldrwq_z_f32(x, rest);
    EACH {
        vstrwq_p_f32(to[i], vfmaq_n_f32(vldrwq_z_f32(to[i], rest), inputs, g[i]), rest);
    }
}

// dx += dy w, for four rows of w.
static void back(float *dx, const float *dy, const float *const *w, size_t in) {
    const float *from[4];
    float g[4];
    EACH {
        from[i] = w[i];
        g[i] = dy[i];
    }
    for (size_t four = in / 4; four > 0; four--) {
        float32x4_t weights, sum = vldrwq_f32(dx);
        EACH {
            VECTOR_TAKE(weights, from[i]);
            sum = vfmaq_n_f32(sum, weights, g[i]);
        }
        VECTOR_PUT(dx, sum);
    }
    const mve_pred16_t rest = vctp32q(in % 4);
    float32x4_t sum = vldrwq_z_f32(dx, rest);
    EACH {
        sum = vfmaq_n_f32(sum, vldrwq_z_f32(from[i], rest), g[i]);
    }
    vstrwq_p_f32(dx, sum, rest);
}

void fast_linear_backward(float *dx, float *dw, float *db, const float *dy, const float *x,
                          const float *w, size_t in, size_t out, size_t n) {
    for (; n > 0; n--, dy += out) {
        for (size_t o = 0; o < out; o += 4) {
            const float *from[4];
            float *to[4] = {0}, g[4];
            for (size_t i = 0; i < 4; i++) {
                const size_t row = o + tile_lane(i, out - o);
                from[i] = w + row * in;
                to[i] = dw ? dw + row * in : dw;
                g[i] = o + i < out ? dy[row] : 0;
            }
            if (dw) {
                outer(to, g, x, in);
            }
            if (dx) {
                back(dx, g, from, in);
            }
        }
        for (size_t o = 0; db && o < out; o++) {
            db[o] += dy[o];
        }
        x = x ? x + in : x;
        dx = dx ? dx + in : dx;
    }
}

#endif // MVE
