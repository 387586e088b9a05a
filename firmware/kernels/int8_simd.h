// int8_simd.h: which instructions the kernels in 8 bits have for several bytes at once. Where there
// are neither they are plain C; where there are, fast/ has other inner loops under the same names.
#ifndef INT8_SIMD_H
#define INT8_SIMD_H

// Vectors of 16 bytes (Cortex-M55). Without optimization GCC's words for them do not take their
// constants for constants.
#if defined(__ARM_FEATURE_MVE) && defined(__OPTIMIZE__)
#define INT8_MVE 1
#else
#define INT8_MVE 0
#endif

// Two products of 16 bits at once (Cortex-M4, M7 and M33).
#if defined(__ARM_FEATURE_DSP) && !INT8_MVE
#define INT8_DSP 1
#else
#define INT8_DSP 0
#endif

#endif
