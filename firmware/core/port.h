// port.h: what a machine must offer; each folder under ports/ is one implementation.
#ifndef PORT_H
#define PORT_H

#include <stddef.h>
#include <stdint.h>

// Largest body of a frame that a port can send in one piece, bytes (datagram ports: one datagram).
extern uint32_t port_send_max;

// Bytes that may come while the device is busy and are kept until it reads again.
extern const uint32_t port_window;

// Brings up clocks, memory and the link. argc and argv are 0 and NULL on bare metal.
void port_init(int argc, char **argv);

// Waits until bytes have come, copies at most size of them to buffer and returns how many.
size_t port_read(uint8_t *buffer, size_t size);

// Whether the bytes of the last port_read are the first of a datagram; never on a stream.
int port_begins(void);

// Sends size bytes of the frame being written; returns when bytes may be reused.
void port_write(const uint8_t *bytes, size_t size);

// The frame written since the last flush is complete: a datagram port sends it now.
void port_flush(void);

// Fills bytes that nobody can foretell; returns 0, and leaves them alone, where there is no source.
int port_entropy(uint8_t *bytes, size_t size);

// Microseconds since some start; wraps.
uint32_t port_micros(void);

// The most bytes of stack that were in use at once since power-up; 0 where that is not known.
uint32_t port_stack_used(void);

// Packets from a network that were lost in the machine since power-up, for want of room or because
// something was wrong with them; 0 where there is no network, or the system does not tell.
uint32_t port_dropped(void);

#endif
