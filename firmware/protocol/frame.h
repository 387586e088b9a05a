// frame.h: frames on a byte stream: COBS with a zero byte behind each, a seal inside.
//
// A frame before coding: code u8, session u16, sequence u16, body, seal of all that (seal.h),
// little endian. The same frame fills a datagram. host/splitee_host/wire/frame.py is the other end.
#ifndef FRAME_H
#define FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "protocol/seal.h" // what ends a frame

#define FRAME_HEADER_SIZE 5u

// Bytes of a frame, and of its coding, which ends in a zero byte.
#define FRAME_SIZE(body) (FRAME_HEADER_SIZE + (body) + SEAL_SIZE)
#define FRAME_CODED_SIZE(body) (FRAME_SIZE(body) + FRAME_SIZE(body) / 254u + 2u)

struct frame {
    uint8_t code;
    uint16_t session;
    uint16_t sequence;
    const uint8_t *body; // header in front, seal behind
    size_t size;         // of the body, bytes
};

// Collects decoded bytes in memory of the caller. Start it with frame_reader_init.
struct frame_reader {
    uint8_t *buffer;
    size_t capacity; // header + body + seal of the largest frame
    size_t length;
    uint8_t block;  // bytes left in this COBS block
    uint8_t filled; // whether this block ends in a zero that was left out
    uint8_t broken; // this frame is being skipped up to the next zero byte
    uint32_t bad;   // frames dropped since init: too long, miscoded, too short or with a wrong seal
};

void frame_reader_init(struct frame_reader *reader, uint8_t *buffer, size_t capacity);

// Takes one byte from the link. Returns 1 when it completed a well-coded frame; *frame then points
// into the reader's buffer until the next call. It is good if frame_holds says so, too. Empty
// frames (runs of zero bytes) are not counted.
int frame_read(struct frame_reader *reader, uint8_t byte, struct frame *frame);

// Whether the frame just read has a seal of that kind; counts it as bad when not.
int frame_holds(struct frame_reader *reader, const struct frame *frame, const struct sealing *how);

// Writes one frame through port_write and port_flush; its body is given in two pieces, so that
// tensors are sent from where they lie.
void frame_write(const struct sealing *how, uint8_t code, uint16_t session, uint16_t sequence,
                 const uint8_t *fields, size_t fields_size, const uint8_t *tail, size_t tail_size);

#endif
