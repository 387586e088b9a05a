// dsp.h: words for the loops in 8 bits on a core that multiplies two pairs of 16 bits at once
// (Cortex-M4, M7 and M33).
//
// Four bytes are loaded at once and become two pairs: the even ones (0 and 2) and the odd ones (1
// and 3). It does not matter which pair is which, as long as both factors have the same.
#ifndef DSP_H
#define DSP_H

#include "kernels/int8_simd.h"

#if INT8_DSP

#include <arm_acle.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/int8_scale.h" // sums to outputs

// Four bytes from any address. (memcpy alone would be a call.)
static inline uint32_t dsp_load(const int8_t *from) {
    uint32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

static inline int16x2_t dsp_even(uint32_t bytes) {
    return __sxtb16((int8x4_t)bytes);
}

// Assembly, since GCC would rotate first, by an instruction of its own.
static inline int16x2_t dsp_odd(uint32_t bytes) {
    int16x2_t pair;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(pair) : "r"(bytes));
    return pair;
}

// Whether an int8 can be beyond the bounds. It seldom can, and then nothing has to be compared.
static inline int dsp_narrow(const struct int8_output *to) {
    return to->min > INT8_MIN || to->max < INT8_MAX;
}

// int8_clamp, for an output that is narrow or not. (Of GCC's own word for ssat the warnings are not
// clean.)
static inline int8_t dsp_clamp(int32_t value, struct int8_output to, int narrow) {
    __asm__("ssat %0, #8, %0" : "+r"(value));
    return narrow ? int8_clamp(value, to) : (int8_t)value;
}

// int8_put likewise.
static inline int8_t dsp_put(int32_t sum, struct int8_factor f, struct int8_output to, int narrow) {
    return dsp_clamp(int8_multiply(sum, f, to.zero), to, narrow);
}

#endif // INT8_DSP

#endif
