// mps2.c: the port for Arm's MPS2 and MPS3 boards with a Cortex-M3, M4, M7, M33 or M55 (as QEMU
// emulates them): frames over UART0, time from SysTick.
#include "ports/mps2/mps2.h"

#include "core/port.h"          // what this file implements
#include "ports/mps2/machine.h" // addresses, clocks
#include "ports/ring.h"         // bytes received
#include "ports/stack.h"        // what is left of its paint

#define BAUD_RATE 115200u

// CMSDK APB UART (Arm DDI 0479): one byte of buffer in each direction.
struct uart {
    uint32_t data;
    uint32_t state; // UART_*_FULL
    uint32_t control;
    uint32_t interrupt; // reads which are raised, clears those written as 1
    uint32_t divider;
};
#define UART0 ((volatile struct uart *)UART0_ADDRESS)
#define UART_TX_FULL 0x1u
#define UART_RX_FULL 0x2u
#define UART_TX_ENABLE 0x1u
#define UART_RX_ENABLE 0x2u
#define UART_RX_INTERRUPT_ENABLE 0x8u
#define UART_RX_INTERRUPT 0x2u

// System registers of Armv7-M and later.
#define SYSTICK_CONTROL (*(volatile uint32_t *)0xE000E010u)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xE000E014u)
#define SYSTICK_VALUE (*(volatile uint32_t *)0xE000E018u)
#define NVIC_ENABLE ((volatile uint32_t *)0xE000E100u) // a bit for each interrupt
#define NVIC_PEND ((volatile uint32_t *)0xE000E200u)
#define INTERRUPT_CONTROL (*(volatile uint32_t *)0xE000ED04u)
#define SYSTICK_PENDING (1u << 26)

// SysTick counts down 24 bits: two turns a second leave it some room.
#define TURN_MICROS 500000u
#define TICKS_PER_MICRO (CORE_HZ / 1000000u)
#define TURN_TICKS (TURN_MICROS * TICKS_PER_MICRO)

static struct ring ring;
static volatile uint32_t turns; // of SysTick

// A UART sets no limit; a frame that is spoilt on a real line costs this much to send again.
uint32_t port_send_max = 4096;

void port_init(int argc, char **argv) {
    (void)argc;
    (void)argv;
    SYSTICK_RELOAD = TURN_TICKS - 1;
    SYSTICK_VALUE = 0;
    SYSTICK_CONTROL = 0x7; // on, with interrupt, from the core's clock
    UART0->divider = UART0_HZ / BAUD_RATE;
    UART0->control = UART_TX_ENABLE | UART_RX_ENABLE | UART_RX_INTERRUPT_ENABLE;
    // QEMU keeps what was sent before this line until somebody reads.
    (void)UART0->data;
    NVIC_ENABLE[UART0_RECEIVE / 32] = 1u << UART0_RECEIVE % 32;
}

// When the ring is full the byte stays in the UART; port_read raises the interrupt again.
void mps2_uart_interrupt(void) {
    UART0->interrupt = UART_RX_INTERRUPT; // first: a byte from here on raises it again
    while ((UART0->state & UART_RX_FULL) != 0 && !ring_is_full(&ring)) {
        ring_put(&ring, (uint8_t)UART0->data);
    }
}

size_t port_read(uint8_t *buffer, size_t size) {
    // Masked, an interrupt still ends wfi, and none can slip in between the look and the sleep.
    __asm volatile("cpsid i" ::: "memory");
    while (ring_is_empty(&ring)) {
        __asm volatile("wfi\n\tcpsie i\n\tisb\n\tcpsid i" ::: "memory");
    }
    __asm volatile("cpsie i" ::: "memory");
    const size_t count = ring_get(&ring, buffer, size);
    NVIC_PEND[UART0_RECEIVE / 32] = 1u << UART0_RECEIVE % 32;
    return count;
}

void port_write(const uint8_t *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        while ((UART0->state & UART_TX_FULL) != 0) {
        }
        UART0->data = bytes[i];
    }
}

void port_flush(void) {
}

void mps2_systick_interrupt(void) {
    turns++;
}

uint32_t port_micros(void) {
    __asm volatile("cpsid i" ::: "memory");
    uint32_t turn = turns;
    uint32_t value = SYSTICK_VALUE;
    if ((INTERRUPT_CONTROL & SYSTICK_PENDING) != 0) { // a turn ended that is not counted yet
        turn++;
        value = SYSTICK_VALUE;
    }
    __asm volatile("cpsie i" ::: "memory");
    return turn * TURN_MICROS + (TURN_TICKS - 1 - value) / TICKS_PER_MICRO;
}

uint32_t port_stack_used(void) {
    return stack_used();
}
