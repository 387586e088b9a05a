// serial.c: frames over UART0 of an MPS2 or MPS3 board; the board's link is "serial".
#include "core/port.h"          // what this file and mps2.c implement
#include "ports/mps2/machine.h" // addresses, clocks
#include "ports/mps2/mps2.h"    // what mps2.c needs of a link
#include "ports/ring.h"         // bytes received

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

static struct ring ring;

// A UART sets no limit; a frame that is spoilt on a real line costs this much to send again.
uint32_t port_send_max = 4096;
const uint32_t port_window = RING_SIZE;

void mps2_link_init(void) {
    UART0->divider = UART0_HZ / BAUD_RATE;
    UART0->control = UART_TX_ENABLE | UART_RX_ENABLE | UART_RX_INTERRUPT_ENABLE;
    // QEMU keeps what was sent before these lines until somebody reads. When the first byte of that
    // comes between the two, it is what is read here; otherwise this is 0.
    const uint8_t early = (uint8_t)UART0->data;
    if (early != 0) {
        ring_put(&ring, early);
    }
    mps2_enable(UART0_RECEIVE);
}

// When the ring is full the byte stays in the UART; port_read raises the interrupt again.
void mps2_link_interrupt(void) {
    UART0->interrupt = UART_RX_INTERRUPT; // first: a byte from here on raises it again
    while ((UART0->state & UART_RX_FULL) != 0 && !ring_is_full(&ring)) {
        ring_put(&ring, (uint8_t)UART0->data);
    }
}

size_t port_read(uint8_t *buffer, size_t size) {
    mps2_mask();
    while (ring_is_empty(&ring)) {
        mps2_sleep();
    }
    mps2_unmask();
    const size_t count = ring_get(&ring, buffer, size);
    mps2_raise(UART0_RECEIVE);
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

int port_begins(void) {
    return 0;
}

uint32_t port_dropped(void) {
    return 0;
}
