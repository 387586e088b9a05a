// device.h: the device's half of the protocol: one request at a time, carried out once.
#ifndef DEVICE_H
#define DEVICE_H

#include <stddef.h>
#include <stdint.h>

// Call once, before the first bytes.
void device_init(void);

// Takes bytes from the link, in pieces of any size, and answers every complete request through
// port_write before it returns.
void device_receive(const uint8_t *bytes, size_t size);

#endif
