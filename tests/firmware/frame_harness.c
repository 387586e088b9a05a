// frame_harness.c: frame.c and messages.h for test_frame_c.py: a port whose link is memory.
#include "core/port.h" // port_write, port_flush
#include "protocol/frame.h"
#include "protocol/messages.h"
#include <stdlib.h>
#include <string.h>

static uint8_t sent[1u << 20];
static size_t sent_size;
static unsigned flushed;

void port_write(const uint8_t *bytes, size_t size) {
    if (size > sizeof sent - sent_size) {
        abort();
    }
    memcpy(sent + sent_size, bytes, size);
    sent_size += size;
}

void port_flush(void) {
    flushed++;
}

static struct sealing how;

// How frames are sealed from now on, where a key is built in.
void frame_harness_seal(const uint8_t *of, uint8_t direction, uint16_t turns) {
    static uint8_t key[KEY_SIZE];
    memcpy(key, of, sizeof key);
    how = (struct sealing){key, direction, turns};
}

// Writes a frame; *bytes then points to what went to the port. Returns how many bytes that were,
// or 0 when the port was not flushed exactly once.
size_t frame_harness_write(uint8_t code, uint16_t session, uint16_t sequence, const uint8_t *fields,
                           size_t fields_size, const uint8_t *tail, size_t tail_size,
                           const uint8_t **bytes) {
    sent_size = 0;
    flushed = 0;
    frame_write(&how, code, session, sequence, fields, fields_size, tail, tail_size);
    *bytes = sent;
    return flushed == 1 ? sent_size : 0;
}

#define UNTOUCHED 0xC7

static uint8_t memory[1u << 16];
static struct frame_reader reader;

void frame_harness_start(size_t capacity) {
    memset(memory, UNTOUCHED, sizeof memory);
    frame_reader_init(&reader, memory, capacity);
}

// Reads bytes up to the end of the next good frame, or to the end; returns how many it took. *found
// says whether there is a frame; its parts are then in the other outputs.
size_t frame_harness_read(const uint8_t *bytes, size_t size, int *found, uint8_t *code,
                          uint16_t *session, uint16_t *sequence, const uint8_t **body,
                          size_t *body_size) {
    struct frame frame = {0};
    size_t i = 0;
    *found = 0;
    while (i < size && !*found) {
        *found = frame_read(&reader, bytes[i++], &frame) && frame_holds(&reader, &frame, &how);
    }
    *code = frame.code;
    *session = frame.session;
    *sequence = frame.sequence;
    *body = frame.body;
    *body_size = frame.size;
    return i;
}

uint32_t frame_harness_bad(void) {
    return reader.bad;
}

// Whether the reader kept to its memory.
int frame_harness_kept_within(size_t capacity) {
    for (size_t i = capacity; i < sizeof memory; i++) {
        if (memory[i] != UNTOUCHED) {
            return 0;
        }
    }
    return 1;
}

// What messages.h defines inline, as functions that ctypes finds.
#define UNPACK(name)                                                                               \
    void unpack_##name(struct message_##name *m, const uint8_t *body) {                            \
        message_##name##_unpack(m, body);                                                          \
    }
#define PACK(name)                                                                                 \
    void pack_##name(const struct message_##name *m, uint8_t *body) {                              \
        message_##name##_pack(m, body);                                                            \
    }
UNPACK(hello)
UNPACK(settings)
UNPACK(place)
UNPACK(forward)
UNPACK(infer)
UNPACK(read)
UNPACK(write)
UNPACK(run)
UNPACK(select)
UNPACK(coding)
PACK(welcome)
PACK(stepped)
PACK(content)
PACK(written)
PACK(counters)
PACK(refused)
