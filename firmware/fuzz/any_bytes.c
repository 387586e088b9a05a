// any_bytes.c: a fuzz target: frame_read takes any bytes, and is held to a decoder that sees each
// frame whole.
//
// An input is the bytes of memory that the reader has, u16, and then what comes over the link.
#include <stdlib.h>
#include <string.h>

#include "core/port.h" // what frame_write needs; nothing is written here
#include "protocol/bytes.h"
#include "protocol/frame.h"

void port_write(const uint8_t *bytes, size_t size) {
    (void)bytes;
    (void)size;
}

void port_flush(void) {
}

// Decodes size bytes without a zero; returns how many there are then, or 0 when they are no coding.
static size_t decode(uint8_t *data, const uint8_t *coded, size_t size) {
    size_t length = 0;
    for (size_t at = 0; at < size;) {
        const size_t code = coded[at];
        if (code > size - at) {
            return 0;
        }
        memcpy(data + length, coded + at + 1, code - 1);
        length += code - 1;
        at += code;
        if (code < 255 && at < size) {
            data[length++] = 0;
        }
    }
    return length;
}

// CRC-32 by its definition, bit by bit.
static uint32_t crc32(const uint8_t *bytes, size_t size) {
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < 8 * size; i++) {
        const uint32_t bit = (crc ^ bytes[i / 8] >> i % 8) & 1u;
        crc = crc >> 1 ^ (bit ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static void hold(int condition) {
    if (!condition) {
        abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    if (size < 2) {
        return 0;
    }
    const size_t capacity = bytes_get_u16(input);
    const uint8_t *const stream = input + 2;
    size -= 2;
    uint8_t *const memory = malloc(capacity), *const data = malloc(size + 1);
    struct frame_reader reader;
    struct frame frame;
    uint32_t bad = 0;
    frame_reader_init(&reader, memory, capacity);
    for (size_t i = 0, start = 0; i < size; i++) {
        const int found =
            frame_read(&reader, stream[i], &frame) && frame_holds(&reader, &frame, NULL);
        if (stream[i] != 0) {
            hold(!found);
            continue;
        }
        const size_t length = decode(data, stream + start, i - start);
        const int good = length >= 9 && length <= capacity &&
                         crc32(data, length - 4) == bytes_get_u32(data + length - 4);
        bad += !good && i > start;
        hold(found == good && reader.bad == bad);
        if (good) {
            hold(frame.code == data[0] && frame.session == bytes_get_u16(data + 1) &&
                 frame.sequence == bytes_get_u16(data + 3) && frame.size == length - 9 &&
                 memcmp(frame.body, data + 5, frame.size) == 0);
        }
        start = i + 1;
    }
    free(data);
    free(memory);
    return 0;
}
