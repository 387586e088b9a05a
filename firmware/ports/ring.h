// ring.h: the bytes that a serial port's interrupt received and port_read has not yet fetched.
//
// One writer, the interrupt, and one reader: neither has to lock the other out.
#ifndef RING_H
#define RING_H

#include <stddef.h>
#include <stdint.h>

#include "protocol/frame.h" // sizes

// While the device computes, a whole request finds room.
#define RING_SIZE 2048u
_Static_assert(FRAME_CODED_SIZE(RECEIVE_MAX) <= RING_SIZE, "a frame does not fit the ring");

// Both counters run freely; their difference is what the ring holds.
struct ring {
    volatile uint8_t bytes[RING_SIZE];
    volatile uint32_t written, read;
};

static inline int ring_is_empty(const struct ring *r) {
    return r->read == r->written;
}

static inline int ring_is_full(const struct ring *r) {
    return r->written - r->read == RING_SIZE;
}

// Only when it is not full.
static inline void ring_put(struct ring *r, uint8_t byte) {
    r->bytes[r->written % RING_SIZE] = byte;
    r->written++;
}

// Moves at most size bytes to buffer and returns how many.
static inline size_t ring_get(struct ring *r, uint8_t *buffer, size_t size) {
    size_t count = 0;
    while (count < size && !ring_is_empty(r)) {
        buffer[count++] = r->bytes[r->read % RING_SIZE];
        r->read++;
    }
    return count;
}

#endif
