// rv32.c: the port for 32-bit RISC-V as QEMU's board "virt" has it, with or without FPU: frames
// over its 16550 UART, time from the core's timer.
#include "ports/rv32/rv32.h"

#include "core/port.h"   // what this file implements
#include "ports/ring.h"  // bytes received
#include "ports/stack.h" // what is left of its paint

// 16550 UART. Its FIFO stays off: switching it on would lose what was sent before.
struct uart {
    uint8_t data;             // divider, low byte, while UART_DIVIDER is set
    uint8_t interrupt_enable; // divider, high byte
    uint8_t fifo;
    uint8_t line;
    uint8_t modem;
    uint8_t state; // UART_*
};
#define UART0 ((volatile struct uart *)0x10000000u)
#define UART_DIVIDER 0x80u
#define UART_8N1 0x03u
#define UART_RX_INTERRUPT 0x01u
#define UART_RX_FULL 0x01u
#define UART_TX_EMPTY 0x20u
#define UART0_HZ 3686400u
#define BAUD_RATE 115200u
#define DIVIDER (UART0_HZ / 16 / BAUD_RATE)

// Platform-level interrupt controller, for machine mode of the first core.
#define PLIC_PRIORITY ((volatile uint32_t *)0x0C000000u) // a word for each interrupt
#define PLIC_ENABLE ((volatile uint32_t *)0x0C002000u)   // a bit for each
#define PLIC_THRESHOLD (*(volatile uint32_t *)0x0C200000u)
#define PLIC_CLAIM (*(volatile uint32_t *)0x0C200004u)
#define UART0_INTERRUPT 10u

// The core's timer: 64 bits in two words, low first.
#define TIME ((volatile uint32_t *)0x0200BFF8u)
#define TICKS_PER_MICRO 10u

#define EXTERNAL_INTERRUPT (1u << 11) // mie
#define INTERRUPTS 0x8u               // mstatus.MIE

static struct ring ring;

// A UART sets no limit; a frame that is spoilt on a real line costs this much to send again.
uint32_t port_send_max = 4096;
const uint32_t port_window = RING_SIZE;

void port_init(int argc, char **argv) {
    (void)argc;
    (void)argv;
    UART0->line = UART_DIVIDER;
    UART0->data = DIVIDER & 0xFF;
    UART0->interrupt_enable = DIVIDER >> 8;
    UART0->line = UART_8N1;
    PLIC_PRIORITY[UART0_INTERRUPT] = 1;
    PLIC_ENABLE[UART0_INTERRUPT / 32] = 1u << UART0_INTERRUPT % 32;
    PLIC_THRESHOLD = 0;
    UART0->interrupt_enable = UART_RX_INTERRUPT;
    CSR("csrs mie", EXTERNAL_INTERRUPT);
    CSR("csrs mstatus", INTERRUPTS);
}

// When the ring is full the byte stays in the UART, which goes on asking for the interrupt: it is
// switched off until port_read has made room.
__attribute__((interrupt("machine"))) void rv32_external_interrupt(void) {
    const uint32_t which = PLIC_CLAIM;
    while ((UART0->state & UART_RX_FULL) != 0 && !ring_is_full(&ring)) {
        ring_put(&ring, UART0->data);
    }
    if (ring_is_full(&ring)) {
        UART0->interrupt_enable = 0;
    }
    PLIC_CLAIM = which;
}

size_t port_read(uint8_t *buffer, size_t size) {
    // Masked, an interrupt still ends wfi, and none can slip in between the look and the sleep.
    CSR("csrc mstatus", INTERRUPTS);
    while (ring_is_empty(&ring)) {
        __asm volatile("wfi" ::: "memory");
        CSR("csrs mstatus", INTERRUPTS);
        CSR("csrc mstatus", INTERRUPTS);
    }
    CSR("csrs mstatus", INTERRUPTS);
    const size_t count = ring_get(&ring, buffer, size);
    UART0->interrupt_enable = UART_RX_INTERRUPT;
    return count;
}

void port_write(const uint8_t *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        while ((UART0->state & UART_TX_EMPTY) == 0) {
        }
        UART0->data = bytes[i];
    }
}

void port_flush(void) {
}

uint32_t port_micros(void) {
    uint32_t high, low;
    do { // again when the low word ran over in between
        high = TIME[1];
        low = TIME[0];
    } while (high != TIME[1]);
    return (uint32_t)(((uint64_t)high << 32 | low) / TICKS_PER_MICRO);
}

uint32_t port_stack_used(void) {
    return stack_used();
}

uint32_t port_dropped(void) {
    return 0;
}

int port_begins(void) {
    return 0;
}

// The machine has no source of random bytes.
int port_entropy(uint8_t *bytes, size_t size) {
    (void)bytes;
    (void)size;
    return 0;
}
