// mps2.h: what mps2.c, the vector table (startup.c) and the one link that is built in (serial.c or
// udp.c) need of each other.
#ifndef MPS2_H
#define MPS2_H

#include <stdint.h>

// Interrupts that the vector table leads to.
void mps2_systick_interrupt(void);
void mps2_link_interrupt(void);

// The link: switches it on.
void mps2_link_init(void);

#define MPS2_NVIC_ENABLE ((volatile uint32_t *)0xE000E100u) // a bit for each interrupt
#define MPS2_NVIC_PEND ((volatile uint32_t *)0xE000E200u)

static inline void mps2_enable(uint32_t interrupt) {
    MPS2_NVIC_ENABLE[interrupt / 32] = 1u << interrupt % 32;
}

static inline void mps2_raise(uint32_t interrupt) {
    MPS2_NVIC_PEND[interrupt / 32] = 1u << interrupt % 32;
}

static inline void mps2_mask(void) {
    __asm volatile("cpsid i" ::: "memory");
}

static inline void mps2_unmask(void) {
    __asm volatile("cpsie i" ::: "memory");
}

// Waits for an interrupt and lets it run. Call it masked: masked, an interrupt still ends wfi, and
// none can slip in between a look at what it brings and the sleep.
static inline void mps2_sleep(void) {
    __asm volatile("wfi\n\tcpsie i\n\tisb\n\tcpsid i" ::: "memory");
}

#endif
