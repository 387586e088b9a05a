// session.c: numbers and keys of the session that is on, and of the one that a hello prepared.
#include "core/session.h" // itself

#include <string.h>

#include "core/port.h"      // random bytes
#include "protocol/bytes.h" // little endian

struct session {
    uint16_t number;   // 0: there is none
    uint32_t sequence; // of the last request; frames carry the lower half
    uint8_t key[KEY_SIZE];
};

static struct session active, greeted;
static uint64_t nonce;
static uint8_t drawn; // whether the nonce is new: no session has begun with it
static uint8_t fresh; // whether it is random
static uint32_t foreign;

void session_init(void) {
    active = greeted = (struct session){0};
    nonce = drawn = fresh = 0;
    foreign = 0;
}

uint32_t session_foreign(void) {
    return foreign;
}

static const uint8_t *long_term_key(void) {
#ifdef KEYED
    return device_key;
#else
    return NULL;
#endif
}

static enum turn stray(void) {
    foreign++;
    return TURN_NONE;
}

enum turn session_take(struct frame_reader *from, const struct frame *frame) {
    if (frame->code == MESSAGE_HELLO) {
        const struct sealing how = {long_term_key(), TO_DEVICE, 0};
        if (!frame_holds(from, frame, &how)) {
            return TURN_NONE;
        }
        return frame->session != 0 && frame->sequence == 0 ? TURN_HELLO : stray();
    }
    struct session *of = frame->session == active.number ? &active : &greeted;
    // A number stands for the nearest one that ends like it.
    const uint16_t ahead = (uint16_t)(frame->sequence - of->sequence);
    const uint32_t sequence = of->sequence + ahead - (ahead < 0x8000u ? 0 : 0x10000u);
    const struct sealing how = {of->key, TO_DEVICE, (uint16_t)(sequence >> 16)};
    if (!frame_holds(from, frame, &how)) {
        return TURN_NONE;
    }
    if (frame->session != of->number || of->number == 0) {
        return stray();
    }
    if (of == &greeted) {
        if (sequence != 1) {
            return stray();
        }
        active = greeted;
        active.sequence = 1;
        greeted.number = 0;
        drawn = 0; // a nonce makes one session
        return TURN_FIRST;
    }
    if (sequence == 0 || ahead > 1) {
        return stray();
    }
    active.sequence = sequence;
    return ahead == 1 ? TURN_NEXT : TURN_AGAIN;
}

void session_greet(uint16_t number, const struct message_hello *hello,
                   struct message_welcome *welcome) {
    if (!drawn) {
        uint8_t bytes[8];
        fresh = port_entropy(bytes, sizeof bytes) != 0;
        // Without a source, time is all that differs from one power-up to the next.
        nonce = fresh ? bytes_get_u64(bytes) : nonce + 1 + port_micros();
        drawn = 1;
    }
    greeted.number = number;
    greeted.sequence = 0;
#ifdef KEYED
    uint8_t nonces[18];
    struct blake2s hash;
    bytes_put_u64(nonces, hello->nonce);
    bytes_put_u64(nonces + 8, nonce);
    bytes_put_u16(nonces + 16, number);
    blake2s_init(&hash, KEY_SIZE, device_key, KEY_SIZE);
    blake2s_update(&hash, nonces, sizeof nonces);
    blake2s_final(&hash, greeted.key);
#else
    (void)hello;
#endif
    welcome->session = active.number;
    welcome->fresh = fresh;
    welcome->nonce = nonce;
}

void session_answer(enum turn turn, uint8_t code, const uint8_t *fields, size_t fields_size,
                    const uint8_t *tail, size_t tail_size) {
    const struct session *of = turn == TURN_HELLO ? &greeted : &active;
    const struct sealing how = {of->key, TO_HOST, (uint16_t)(of->sequence >> 16)};
    frame_write(&how, code, of->number, (uint16_t)of->sequence, fields, fields_size, tail,
                tail_size);
}
