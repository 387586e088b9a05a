// mve.h: words for the loops of the fast kernels on a core with Helium, Arm's vectors (MVE).
//
// A vector holds one value in each of four lanes. One instruction multiplies it by a factor from a
// core register and adds it to a sum, so that loops load what all lanes share into core registers,
// several at once (ldm, which C has no word for and GCC does not find), and what each lane has of
// its own into vectors, from four addresses that are a vector themselves. Eight vectors is all
// there is. In vectors, unlike elsewhere, denormal numbers are zeros; NaN stays NaN.
//
// x stands for the variables x0, x1, x2, ...
//   CORES3(x, r4, r5, r6)  declares x0 ... x2 in these registers, in rising order
//   CORE_LOAD3(x, p)       x0 ... x2 = p[0] ... p[2]
//   CORE_TAKE3(x, p)       the same, and p moves on behind them
#ifndef MVE_H
#define MVE_H

// Bit 1 is arithmetic of floats, bit 0 of integers. Without optimization GCC's intrinsics do not
// take their constants for constants.
#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2) && defined(__OPTIMIZE__)
#define MVE 1
#else
#define MVE 0
#endif

#if MVE

#include <arm_mve.h>
#include <stddef.h>
#include <string.h> // memcpy

// ---- lanes ----

// Four pointers as a vector.
static inline uint32x4_t lanes_at(const void *pointers) {
    uint32x4_t at;
    memcpy(&at, pointers, sizeof at);
    return at;
}

// The same for `count` pointers, `step` floats apart; the last one again where there is none.
static inline uint32x4_t lanes_apart(const float *first, size_t step, size_t count) {
    const uint32x4_t last = vdupq_n_u32((uint32_t)count - 1);
    const uint32x4_t lane = vminq_u32(vidupq_n_u32(0, 1), last);
    return vmlaq_n_u32(vdupq_n_u32((uint32_t)first), lane, (uint32_t)(step * sizeof *first));
}

#define LANES_MOVE(at, floats) ((at) = vaddq_n_u32((at), (uint32_t)(floats)*4))

// The float that lies a constant number of floats behind each lane's address.
#define LANES_GET(at, floats) vldrwq_gather_base_f32((at), 4 * (floats))
#define LANES_PUT(at, floats, v) vstrwq_scatter_base_f32((at), 4 * (floats), (v))

// ---- tiles ----

// A tile of tile.h: a vector of lanes for each of its pixels.
#define TILE_LANES(to)                                                                             \
    float32x4_t a = LANES_GET(to, 0), b = LANES_GET(to, 1), c = LANES_GET(to, 2),                  \
                d = LANES_GET(to, 3)

// A weight of each lane, or a gradient: each pixel of a tile sees one of p0 ... p3.
#define TAP_LANES(g, p0, p1, p2, p3)                                                               \
    do {                                                                                           \
        a = vfmaq_n_f32(a, g, p0);                                                                 \
        b = vfmaq_n_f32(b, g, p1);                                                                 \
        c = vfmaq_n_f32(c, g, p2);                                                                 \
        d = vfmaq_n_f32(d, g, p3);                                                                 \
    } while (0)

// Stores a tile, and `to` moves on to the next.
#define PUT_LANES(to)                                                                              \
    do {                                                                                           \
        LANES_PUT(to, 0, a);                                                                       \
        LANES_PUT(to, 1, b);                                                                       \
        LANES_PUT(to, 2, c);                                                                       \
        LANES_PUT(to, 3, d);                                                                       \
        LANES_MOVE(to, 4);                                                                         \
    } while (0)

// ---- neighbouring floats ----

// v is a vector; p moves on behind it. GCC would keep p, and add it up anew for every load.
#define VECTOR_TAKE(v, p)                                                                          \
    __asm__ volatile("vldrw.32 %q[to], [%[at]], #16"                                               \
                     : [to] "=w"(v), [at] "+r"(p)                                                  \
                     : "m"(*(const float(*)[4])(p)))
#define VECTOR_PUT(p, v)                                                                           \
    __asm__ volatile("vstrw.32 %q[from], [%[at]], #16"                                             \
                     : [at] "+r"(p), "=m"(*(float(*)[4])(p))                                       \
                     : [from] "w"(v))

static inline float vector_sum(float32x4_t v) {
    return (v[0] + v[1]) + (v[2] + v[3]);
}

// ---- core registers ----

// Local variables that are bound to registers are there in assembly; between, they are plain C.
#define CORE(x, r) register float x __asm__(#r)
#define CORES3(x, r0, r1, r2)                                                                      \
    CORE(x##0, r0);                                                                                \
    CORE(x##1, r1);                                                                                \
    CORE(x##2, r2)
#define CORES4(x, r0, r1, r2, r3)                                                                  \
    CORES3(x, r0, r1, r2);                                                                         \
    CORE(x##3, r3)
#define CORES6(x, r0, r1, r2, r3, r4, r5)                                                          \
    CORES4(x, r0, r1, r2, r3);                                                                     \
    CORE(x##4, r4);                                                                                \
    CORE(x##5, r5)
#define CORES7(x, r0, r1, r2, r3, r4, r5, r6)                                                      \
    CORES6(x, r0, r1, r2, r3, r4, r5);                                                             \
    CORE(x##6, r6)
#define CORES9(x, r0, r1, r2, r3, r4, r5, r6, r7, r8)                                              \
    CORES7(x, r0, r1, r2, r3, r4, r5, r6);                                                         \
    CORE(x##7, r7);                                                                                \
    CORE(x##8, r8)
#define CORES10(x, r0, r1, r2, r3, r4, r5, r6, r7, r8, r9)                                         \
    CORES9(x, r0, r1, r2, r3, r4, r5, r6, r7, r8);                                                 \
    CORE(x##9, r9)

// Volatile as in wide.h.
#define CORE_LOAD(list, p, n, ...)                                                                 \
    __asm__ volatile("ldmia %[at], {" list "}"                                                     \
                     : __VA_ARGS__                                                                 \
                     : [at] "r"(p), "m"(*(const float(*)[n])(p)))
#define CORE_TO3(x) "=r"(x##0), "=r"(x##1), "=r"(x##2)
#define CORE_TO4(x) CORE_TO3(x), "=r"(x##3)
#define CORE_TO7(x) CORE_TO4(x), "=r"(x##4), "=r"(x##5), "=r"(x##6)
#define CORE_TO9(x) CORE_TO7(x), "=r"(x##7), "=r"(x##8)
#define CORE_LOAD3(x, p) CORE_LOAD("%0,%1,%2", p, 3, CORE_TO3(x))
#define CORE_LOAD4(x, p) CORE_LOAD("%0,%1,%2,%3", p, 4, CORE_TO4(x))
#define CORE_LOAD6(x, p) CORE_LOAD("%0,%1,%2,%3,%4,%5", p, 6, CORE_TO4(x), "=r"(x##4), "=r"(x##5))
#define CORE_LOAD7(x, p) CORE_LOAD("%0,%1,%2,%3,%4,%5,%6", p, 7, CORE_TO7(x))
#define CORE_LOAD9(x, p) CORE_LOAD("%0,%1,%2,%3,%4,%5,%6,%7,%8", p, 9, CORE_TO9(x))
#define CORE_LOAD10(x, p) CORE_LOAD("%0,%1,%2,%3,%4,%5,%6,%7,%8,%9", p, 10, CORE_TO9(x), "=r"(x##9))

#define CORE_TAKE3(x, p)                                                                           \
    __asm__ volatile("ldmia %[at]!, {%0,%1,%2}"                                                    \
                     : CORE_TO3(x), [at] "+r"(p)                                                   \
                     : "m"(*(const float(*)[3])(p)))

#endif // MVE

#endif
