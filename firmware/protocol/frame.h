// frame.h: frames on a byte stream: COBS with a zero byte behind each, CRC-32 inside.
//
// A frame before coding: code u8, session u16, sequence u16, body, CRC-32 of all that u32, little
// endian. The same frame fills a datagram. host/splitee_host/wire/frame.py is the other end.
#ifndef FRAME_H
#define FRAME_H

#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER_SIZE 5u
#define FRAME_CRC_SIZE 4u

struct frame {
    uint8_t code;
    uint16_t session;
    uint16_t sequence;
    const uint8_t *body;
    size_t size; // of the body, bytes
};

// Collects decoded bytes in memory of the caller. Start it with frame_reader_init.
struct frame_reader {
    uint8_t *buffer;
    size_t capacity; // header + body + CRC of the largest frame
    size_t length;
    uint8_t block;  // bytes left in this COBS block
    uint8_t filled; // whether this block ends in a zero that was left out
    uint8_t broken; // this frame is being skipped up to the next zero byte
    uint32_t bad;   // frames dropped since init: too long, miscoded, too short or wrong CRC
};

void frame_reader_init(struct frame_reader *reader, uint8_t *buffer, size_t capacity);

// Takes one byte from the link. Returns 1 when it completed a good frame; *frame then points into
// the reader's buffer until the next call. Empty frames (runs of zero bytes) are not counted.
int frame_read(struct frame_reader *reader, uint8_t byte, struct frame *frame);

// Writes one frame through port_write and port_flush; its body is given in two pieces, so that
// tensors are sent from where they lie.
void frame_write(uint8_t code, uint16_t session, uint16_t sequence, const uint8_t *fields,
                 size_t fields_size, const uint8_t *tail, size_t tail_size);

// CRC-32 (ISO-HDLC, as zlib.crc32): start with crc = 0 and pass the last result on.
uint32_t frame_crc32(uint32_t crc, const uint8_t *bytes, size_t size);

#endif
