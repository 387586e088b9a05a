// frame.c: COBS, byte by byte in both directions; frame.h is the manual.
#include "protocol/frame.h" // itself

#include "core/port.h"      // port_write, port_flush
#include "protocol/bytes.h" // little endian

#define FULL 0xFFu // code of a full block: 254 bytes, and no zero byte behind them

// ---- writing ----

// A block being collected: its code is known only at its end.
struct block {
    uint8_t bytes[FULL]; // the code, then up to 254 bytes
    size_t length;       // of bytes in use; this is the code
    uint8_t after_full;  // whether the block before this one was full
};

static void end_block(struct block *block) {
    block->bytes[0] = (uint8_t)block->length;
    port_write(block->bytes, block->length);
    block->after_full = block->length == FULL;
    block->length = 1;
}

static void put(struct block *block, const uint8_t *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        if (bytes[i] != 0) {
            block->bytes[block->length++] = bytes[i];
        }
        if (bytes[i] == 0 || block->length == FULL) {
            end_block(block);
        }
    }
}

void frame_write(const struct sealing *how, uint8_t code, uint16_t session, uint16_t sequence,
                 const uint8_t *fields, size_t fields_size, const uint8_t *tail, size_t tail_size) {
    static const uint8_t delimiter = 0;
    uint8_t header[FRAME_HEADER_SIZE], end[SEAL_SIZE];
    struct seal seal;
    header[0] = code;
    bytes_put_u16(header + 1, session);
    bytes_put_u16(header + 3, sequence);
    seal_start(&seal, how);
    seal_add(&seal, header, sizeof header);
    seal_add(&seal, fields, fields_size);
    seal_add(&seal, tail, tail_size);
    seal_end(&seal, end);

    struct block block;
    block.length = 1;
    block.after_full = 0;
    put(&block, header, sizeof header);
    put(&block, fields, fields_size);
    put(&block, tail, tail_size);
    put(&block, end, sizeof end);
    if (block.length > 1 || !block.after_full) {
        end_block(&block);
    }
    port_write(&delimiter, 1);
    port_flush();
}

// ---- reading ----

static void start(struct frame_reader *reader) {
    reader->length = 0;
    reader->block = 0;
    reader->filled = 0;
    reader->broken = 0;
}

void frame_reader_init(struct frame_reader *reader, uint8_t *buffer, size_t capacity) {
    reader->buffer = buffer;
    reader->capacity = capacity;
    reader->bad = 0;
    start(reader);
}

static void append(struct frame_reader *reader, uint8_t byte) {
    if (reader->length == reader->capacity) {
        reader->broken = 1;
    } else {
        reader->buffer[reader->length++] = byte;
    }
}

int frame_read(struct frame_reader *reader, uint8_t byte, struct frame *frame) {
    if (byte != 0) {
        if (reader->broken) {
            return 0;
        }
        if (reader->block > 0) {
            reader->block--;
            append(reader, byte);
            return 0;
        }
        // A code: only now is it known that the zero byte behind the last block is not the end.
        if (reader->filled) {
            append(reader, 0);
        }
        reader->block = (uint8_t)(byte - 1u);
        reader->filled = byte != FULL;
        return 0;
    }

    const int empty =
        reader->length == 0 && reader->block == 0 && !reader->filled && !reader->broken;
    const int whole = !reader->broken && reader->block == 0 && reader->length >= FRAME_SIZE(0);
    if (whole) {
        const uint8_t *bytes = reader->buffer;
        frame->code = bytes[0];
        frame->session = bytes_get_u16(bytes + 1);
        frame->sequence = bytes_get_u16(bytes + 3);
        frame->body = bytes + FRAME_HEADER_SIZE;
        frame->size = reader->length - FRAME_SIZE(0);
    } else if (!empty) {
        reader->bad++;
    }
    start(reader);
    return whole;
}

int frame_holds(struct frame_reader *reader, const struct frame *frame, const struct sealing *how) {
    const int holds = seal_holds(how, frame->body - FRAME_HEADER_SIZE,
                                 FRAME_HEADER_SIZE + frame->size, frame->body + frame->size);
    reader->bad += !holds;
    return holds;
}
