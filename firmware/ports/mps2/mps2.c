// mps2.c: the port for Arm's MPS2 and MPS3 boards with a Cortex-M3, M4, M7, M33 or M55 (as QEMU
// emulates them): time from SysTick, and the stack; serial.c or udp.c is the link.
#include "ports/mps2/mps2.h"

#include "core/port.h"          // what this file and the link implement
#include "ports/mps2/machine.h" // clocks
#include "ports/stack.h"        // what is left of its paint

// System registers of Armv7-M and later.
#define SYSTICK_CONTROL (*(volatile uint32_t *)0xE000E010u)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xE000E014u)
#define SYSTICK_VALUE (*(volatile uint32_t *)0xE000E018u)
#define INTERRUPT_CONTROL (*(volatile uint32_t *)0xE000ED04u)
#define SYSTICK_PENDING (1u << 26)

// SysTick counts down 24 bits: two turns a second leave it some room.
#define TURN_MICROS 500000u
#define TICKS_PER_MICRO (CORE_HZ / 1000000u)
#define TURN_TICKS (TURN_MICROS * TICKS_PER_MICRO)

static volatile uint32_t turns; // of SysTick

void port_init(int argc, char **argv) {
    (void)argc;
    (void)argv;
    SYSTICK_RELOAD = TURN_TICKS - 1;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 0x7; // on, with interrupt, from the core's clock
    mps2_link_init();
}

void mps2_systick_interrupt(void) {
    turns++;
}

uint32_t port_micros(void) {
    mps2_mask();
    uint32_t turn = turns;
    uint32_t value = SYSTICK_VALUE;
    if ((INTERRUPT_CONTROL & SYSTICK_PENDING) != 0) { // a turn ended that is not counted yet
        turn++;
        value = SYSTICK_VALUE;
    }
    mps2_unmask();
    return turn * TURN_MICROS + (TURN_TICKS - 1 - value) / TICKS_PER_MICRO;
}

uint32_t port_stack_used(void) {
    return stack_used();
}

// The boards have no source of random bytes.
int port_entropy(uint8_t *bytes, size_t size) {
    (void)bytes;
    (void)size;
    return 0;
}
