// wide.h: moves several neighbouring floats at once: what the loops of the fast kernels rest on.
//
// An Arm core with an FPU fills consecutive registers from memory by one instruction (vldm), which
// C has no word for and GCC does not find. Here the variables of an inner loop are bound to their
// registers by name, and loads and stores are assembly; the arithmetic between them stays C.
// On any other machine the same words are plain variables, loads and stores, so that every loop is
// written once, and what is tested on a PC is what runs on a board.
//
// v stands for the variables v0, v1, v2, ...
//   SINGLES4(v, s0, s1, s2, s3)  declares v0 ... v3 in these registers, which must be consecutive
//   TAKE4(v, p)                  v0 ... v3 = p[0] ... p[3], and p moves on behind them
//   LOAD4(v, p)                  the same, and p stays
//   PUT4(p, v)                   p[0] ... p[3] = v0 ... v3, and p moves on behind them
#ifndef WIDE_H
#define WIDE_H

#if defined(__arm__) && defined(__ARM_FP)

#define SINGLE(v, r) register float v __asm__(#r)

// Volatile keeps the loads where they are written: moved up by the compiler they would find their
// registers still in use.
#define WIDE_TAKE(list, p, n, ...)                                                                 \
    __asm__ volatile("vldmia %0!, " list : "+r"(p), __VA_ARGS__ : "m"(*(const float(*)[n])(p)))
#define WIDE_TO2(v) "=t"(v##0), "=t"(v##1)
#define WIDE_TO3(v) WIDE_TO2(v), "=t"(v##2)
#define WIDE_TO4(v) WIDE_TO3(v), "=t"(v##3)
#define WIDE_TO6(v) WIDE_TO4(v), "=t"(v##4), "=t"(v##5)
#define WIDE_TO8(v) WIDE_TO6(v), "=t"(v##6), "=t"(v##7)
#define TAKE1(v, p) WIDE_TAKE("{%1}", p, 1, "=t"(v##0))
#define TAKE2(v, p) WIDE_TAKE("{%1-%2}", p, 2, WIDE_TO2(v))
#define TAKE3(v, p) WIDE_TAKE("{%1-%3}", p, 3, WIDE_TO3(v))
#define TAKE4(v, p) WIDE_TAKE("{%1-%4}", p, 4, WIDE_TO4(v))
#define TAKE6(v, p) WIDE_TAKE("{%1-%6}", p, 6, WIDE_TO6(v))
#define TAKE7(v, p) WIDE_TAKE("{%1-%7}", p, 7, WIDE_TO6(v), "=t"(v##6))
#define TAKE8(v, p) WIDE_TAKE("{%1-%8}", p, 8, WIDE_TO8(v))
#define TAKE9(v, p) WIDE_TAKE("{%1-%9}", p, 9, WIDE_TO8(v), "=t"(v##8))

// The same, and p stays where it is.
#define WIDE_LOAD(list, p, n, ...)                                                                 \
    __asm__ volatile("vldmia %[at], " list:__VA_ARGS__ : [at] "r"(p), "m"(*(const float(*)[n])(p)))
#define LOAD4(v, p) WIDE_LOAD("{%0-%3}", p, 4, WIDE_TO4(v))
#define LOAD8(v, p) WIDE_LOAD("{%0-%7}", p, 8, WIDE_TO8(v))
#define LOAD9(v, p) WIDE_LOAD("{%0-%8}", p, 9, WIDE_TO8(v), "=t"(v##8))

#define WIDE_PUT(list, p, n, ...)                                                                  \
    __asm__ volatile("vstmia %0!, " list : "+r"(p), "=m"(*(float(*)[n])(p)) : __VA_ARGS__)
#define WIDE_OF4(v) "t"(v##0), "t"(v##1), "t"(v##2), "t"(v##3)
#define WIDE_OF8(v) WIDE_OF4(v), "t"(v##4), "t"(v##5), "t"(v##6), "t"(v##7)
#define PUT1(p, v) WIDE_PUT("{%2}", p, 1, "t"(v##0))
#define PUT4(p, v) WIDE_PUT("{%2-%5}", p, 4, WIDE_OF4(v))
#define PUT8(p, v) WIDE_PUT("{%2-%9}", p, 8, WIDE_OF8(v))
#define PUT9(p, v) WIDE_PUT("{%2-%10}", p, 9, WIDE_OF8(v), "t"(v##8))

#else

#define SINGLE(v, r) float v __attribute__((unused)) // what is loaded with others may not be

#define TAKE1(v, p) (v##0 = *(p)++)
#define TAKE2(v, p) (v##0 = (p)[0], v##1 = (p)[1], (p) += 2)
#define TAKE3(v, p) (TAKE2(v, p), v##2 = *(p)++)
#define TAKE4(v, p) (TAKE3(v, p), v##3 = *(p)++)
#define TAKE6(v, p) (TAKE4(v, p), v##4 = (p)[0], v##5 = (p)[1], (p) += 2)
#define TAKE7(v, p) (TAKE6(v, p), v##6 = *(p)++)
#define TAKE8(v, p) (TAKE7(v, p), v##7 = *(p)++)
#define TAKE9(v, p) (TAKE8(v, p), v##8 = *(p)++)
#define LOAD4(v, p) (v##0 = (p)[0], v##1 = (p)[1], v##2 = (p)[2], v##3 = (p)[3])
#define LOAD8(v, p) (LOAD4(v, p), v##4 = (p)[4], v##5 = (p)[5], v##6 = (p)[6], v##7 = (p)[7])
#define LOAD9(v, p) (LOAD8(v, p), v##8 = (p)[8])
#define PUT1(p, v) (*(p)++ = v##0)
#define PUT4(p, v) ((p)[0] = v##0, (p)[1] = v##1, (p)[2] = v##2, (p)[3] = v##3, (p) += 4)
#define PUT8(p, v)                                                                                 \
    (PUT4(p, v), (p)[0] = v##4, (p)[1] = v##5, (p)[2] = v##6, (p)[3] = v##7, (p) += 4)
#define PUT9(p, v) (PUT8(p, v), *(p)++ = v##8)

#endif

#define SINGLES2(v, r0, r1)                                                                        \
    SINGLE(v##0, r0);                                                                              \
    SINGLE(v##1, r1)
#define SINGLES3(v, r0, r1, r2)                                                                    \
    SINGLES2(v, r0, r1);                                                                           \
    SINGLE(v##2, r2)
#define SINGLES4(v, r0, r1, r2, r3)                                                                \
    SINGLES3(v, r0, r1, r2);                                                                       \
    SINGLE(v##3, r3)
#define SINGLES6(v, r0, r1, r2, r3, r4, r5)                                                        \
    SINGLES4(v, r0, r1, r2, r3);                                                                   \
    SINGLE(v##4, r4);                                                                              \
    SINGLE(v##5, r5)
#define SINGLES7(v, r0, r1, r2, r3, r4, r5, r6)                                                    \
    SINGLES6(v, r0, r1, r2, r3, r4, r5);                                                           \
    SINGLE(v##6, r6)
#define SINGLES8(v, r0, r1, r2, r3, r4, r5, r6, r7)                                                \
    SINGLES7(v, r0, r1, r2, r3, r4, r5, r6);                                                       \
    SINGLE(v##7, r7)
#define SINGLES9(v, r0, r1, r2, r3, r4, r5, r6, r7, r8)                                            \
    SINGLES8(v, r0, r1, r2, r3, r4, r5, r6, r7);                                                   \
    SINGLE(v##8, r8)

#endif
