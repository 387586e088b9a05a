// int8_bytes.h: short runs of bytes, copied and set where they are needed: a call of memcpy or
// memset takes longer than most of them.
#ifndef INT8_BYTES_H
#define INT8_BYTES_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/int8_simd.h" // whether there are vectors

#if INT8_MVE
#include <arm_mve.h>
#endif

// Keeps GCC from making a loop a call again.
#define INT8_LOOP __asm__ volatile("" ::: "memory")

static inline void int8_copy(int8_t *to, const int8_t *from, size_t size) {
#if INT8_MVE
    for (; size >= 16; size -= 16, to += 16, from += 16) {
        vstrbq_s8(to, vldrbq_s8(from));
    }
    if (size > 0) {
        const mve_pred16_t there = vctp8q(size);
        vstrbq_p_s8(to, vldrbq_z_s8(from, there), there);
    }
#else
    for (; size >= 8; size -= 8, to += 8, from += 8) {
        uint32_t first, second;
        __builtin_memcpy(&first, from, 4);
        __builtin_memcpy(&second, from + 4, 4);
        __builtin_memcpy(to, &first, 4);
        __builtin_memcpy(to + 4, &second, 4);
        INT8_LOOP;
    }
    for (; size > 0; size--) {
        *to++ = *from++;
        INT8_LOOP;
    }
#endif
}

static inline void int8_fill(int8_t *to, int8_t value, size_t size) {
    for (; size > 0; size--) {
        *to++ = value;
        INT8_LOOP;
    }
}

#endif
