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
    // by 16, and lanes behind the end are left alone
    __asm__ volatile("wlstp.8 lr, %[size], 2f\n\t"
                     "1: vldrb.8 q0, [%[from]], #16\n\t"
                     "vstrb.8 q0, [%[to]], #16\n\t"
                     "letp lr, 1b\n\t"
                     "2:"
                     : [to] "+r"(to), [from] "+r"(from)
                     : [size] "r"(size)
                     : "q0", "lr", "memory");
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
#if INT8_MVE
    __asm__ volatile("vdup.8 q0, %[value]\n\t"
                     "wlstp.8 lr, %[size], 2f\n\t"
                     "1: vstrb.8 q0, [%[to]], #16\n\t"
                     "letp lr, 1b\n\t"
                     "2:"
                     : [to] "+r"(to)
                     : [size] "r"(size), [value] "r"(value)
                     : "q0", "lr", "memory");
#else
    for (; size > 0; size--) {
        *to++ = value;
        INT8_LOOP;
    }
#endif
}

// Runs of one size, whose beginnings lie `put` and `step` bytes apart.
static inline void int8_copy_all(int8_t *to, size_t put, const int8_t *from, size_t step,
                                 size_t size, size_t runs) {
#if INT8_MVE
    if (size <= 16) {
        const mve_pred16_t there = vctp8q(size);
        for (; runs > 0; runs--, to += put, from += step) {
            vstrbq_p_s8(to, vldrbq_z_s8(from, there), there);
        }
        return;
    }
#endif
    for (; runs > 0; runs--, to += put, from += step) {
        int8_copy(to, from, size);
    }
}

#endif
