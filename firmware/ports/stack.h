// stack.h: how much of its stack a port without operating system has ever used: painted before
// main, looked at on request.
#ifndef STACK_H
#define STACK_H

#include <stdint.h>

// Places that the linker script defines; the stack grows down from its top.
extern uint32_t stack_start[], stack_top[];

#define STACK_PAINT 0xA5C35A3Cu // like no address and no small number

register uint32_t *stack_pointer __asm("sp");

// Paints all below the caller's frame. Call it before main, while no interrupt is enabled.
static inline void stack_paint(void) {
    // volatile: of this loop the compiler would make a call of memset, which has a frame down there
    for (volatile uint32_t *word = stack_start; (uint32_t *)word < stack_pointer; word++) {
        *word = STACK_PAINT;
    }
}

// Bytes from the top down to the deepest word that is not painted any more.
static inline uint32_t stack_used(void) {
    const uint32_t *word = stack_start;
    while (word != stack_top && *word == STACK_PAINT) {
        word++;
    }
    return (uint32_t)((uintptr_t)stack_top - (uintptr_t)word);
}

#endif
