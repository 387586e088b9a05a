// frame.c: COBS and CRC-32, byte by byte in both directions; frame.h is the manual.
#include "protocol/frame.h" // itself

#include "core/port.h"      // port_write, port_flush
#include "protocol/bytes.h" // little endian

#define FULL 0xFFu // code of a full block: 254 bytes, and no zero byte behind them

uint32_t frame_crc32(uint32_t crc, const uint8_t *bytes, size_t size) {
    // Four bits at a time: a table of 64 bytes instead of 1 KB.
    static const uint32_t table[16] = {
        0x00000000u, 0x1DB71064u, 0x3B6E20C8u, 0x26D930ACu, 0x76DC4190u, 0x6B6B51F4u,
        0x4DB26158u, 0x5005713Cu, 0xEDB88320u, 0xF00F9344u, 0xD6D6A3E8u, 0xCB61B38Cu,
        0x9B64C2B0u, 0x86D3D2D4u, 0xA00AE278u, 0xBDBDF21Cu,
    };
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc ^= bytes[i];
        crc = table[crc & 15u] ^ (crc >> 4);
        crc = table[crc & 15u] ^ (crc >> 4);
    }
    return ~crc;
}

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

void frame_write(uint8_t code, uint16_t session, uint16_t sequence, const uint8_t *fields,
                 size_t fields_size, const uint8_t *tail, size_t tail_size) {
    static const uint8_t delimiter = 0;
    uint8_t header[FRAME_HEADER_SIZE];
    header[0] = code;
    bytes_put_u16(header + 1, session);
    bytes_put_u16(header + 3, sequence);
    uint32_t sum = frame_crc32(0, header, sizeof header);
    sum = frame_crc32(sum, fields, fields_size);
    sum = frame_crc32(sum, tail, tail_size);
    uint8_t crc[FRAME_CRC_SIZE];
    bytes_put_u32(crc, sum);

    struct block block;
    block.length = 1;
    block.after_full = 0;
    put(&block, header, sizeof header);
    put(&block, fields, fields_size);
    put(&block, tail, tail_size);
    put(&block, crc, sizeof crc);
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

// Whether the bytes up to the delimiter were a good frame.
static int is_good(const struct frame_reader *reader) {
    if (reader->broken || reader->block > 0 ||
        reader->length < FRAME_HEADER_SIZE + FRAME_CRC_SIZE) {
        return 0;
    }
    size_t summed = reader->length - FRAME_CRC_SIZE;
    return frame_crc32(0, reader->buffer, summed) == bytes_get_u32(reader->buffer + summed);
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

    int empty = reader->length == 0 && reader->block == 0 && !reader->filled && !reader->broken;
    int good = is_good(reader);
    if (good) {
        const uint8_t *bytes = reader->buffer;
        frame->code = bytes[0];
        frame->session = bytes_get_u16(bytes + 1);
        frame->sequence = bytes_get_u16(bytes + 3);
        frame->body = bytes + FRAME_HEADER_SIZE;
        frame->size = reader->length - FRAME_HEADER_SIZE - FRAME_CRC_SIZE;
    } else if (!empty) {
        reader->bad++;
    }
    start(reader);
    return good;
}
