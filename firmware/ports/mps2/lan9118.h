// lan9118.h: the driver of a board's Ethernet chip, an SMSC LAN9118 or one of its family.
//
// Packets wait in the chip, which has room for about 10 KB of them and drops what comes then. No
// memory of the processor's is set aside for them.
#ifndef LAN9118_H
#define LAN9118_H

#include <stddef.h>
#include <stdint.h>

// Resets the chip, gives it its Ethernet address and lets it send and receive.
void lan9118_init(const uint8_t mac[6]);

// Copies the next packet to memory of capacity bytes, a multiple of 4; the packet's 4 bytes of CRC
// have to fit there, too. Returns its size without them, and 0 when none waits. What does not fit
// and what the chip found damaged is dropped.
size_t lan9118_receive(uint8_t *packet, size_t capacity);

// Hands a packet to the chip, up to 3 bytes beyond its size are read; returns when it is there.
void lan9118_send(const uint8_t *packet, size_t size);

// Whether no packet waits.
int lan9118_is_empty(void);

// Lets the chip interrupt at the next packet. One that waits already is not told of.
void lan9118_expect(void);

// To be called by the interrupt, which ends with it.
void lan9118_interrupt(void);

// Packets dropped since power-up, here or in the chip for want of room. QEMU does not count these.
uint32_t lan9118_dropped(void);

#endif
