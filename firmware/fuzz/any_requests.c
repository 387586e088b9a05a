// any_requests.c: a fuzz target: the device and its segment take requests of every kind in any
// order.
//
// An input is a row of requests: code u8, how u8, size u8, and so many bytes of body (fewer at the
// end of the input). They go through device_receive as frames; how says which:
//   0 to 247 in order, and first of a session that a hello has prepared · 248 the last one again
//   249 one that is late · 250 one too early · 251 of the next session · 252 damaged
//   253 to 255 the body as it is, and a zero byte
// With the core's source in this file, everything can be set back to power-up between two inputs.
#include "core/device.c"
#include "core/session.c"

#include <stdlib.h>

enum how { REPEATED = 248, LATE, EARLY, SESSION, DAMAGED, RAW };

static uint8_t sent[1u << 20]; // everything that was written since power-up
static size_t sent_size;
static unsigned flushed;
static uint32_t now;

static void hold(int condition) {
    if (!condition) {
        abort();
    }
}

// the port

uint32_t port_send_max = 300;
const uint32_t port_window = 1024;

void port_write(const uint8_t *bytes, size_t size) {
    hold(size <= sizeof sent - sent_size);
    memcpy(sent + sent_size, bytes, size);
    sent_size += size;
}

void port_flush(void) {
    flushed++;
}

uint32_t port_micros(void) {
    return now++;
}

uint32_t port_stack_used(void) {
    return 0;
}

int port_entropy(uint8_t *bytes, size_t size) {
    memset(bytes, 7, size);
    return 1;
}

uint32_t port_dropped(void) {
    return 0;
}

// one input

static void power_up(void) {
    memset(&answer, 0, sizeof answer);
    memset(received, 0, sizeof received);
    memset(&settings, 0, sizeof settings);
    memset(&place, 0, sizeof place);
    memset(&pass, 0, sizeof pass);
    memset(&up, 0, sizeof up);
    memset(&down, 0, sizeof down);
    memset(&sending, 0, sizeof sending);
    acted = 0;
    phase = IDLE;
    frames = repeated = compute_micros = 0;
    sent_size = flushed = now = 0;
    const size_t record = 1 + segment.input_size;
    memset(segment.arena, 0, segment.arena_size);
    memset(segment.weights, 0, segment.weight_size * sizeof *segment.weights);
    memset(segment.shard, 0, segment.samples_max * record);
    memset(segment.order, 0, segment.samples_max * sizeof *segment.order);
    memset(segment.labels, 0, segment.capacity);
    device_init();
}

// An answer is one good frame for the request that stands last, of a size that the port can send.
static void check_answer(size_t start) {
    static uint8_t memory[2048];
    struct frame_reader answers;
    struct frame f = {0};
    int found = 0;
    frame_reader_init(&answers, memory, sizeof memory);
    for (size_t i = start; i < sent_size; i++) {
        hold(!found);
        found = frame_read(&answers, sent[i], &f);
    }
    hold(found && answers.bad == 0);
    hold(frame_holds(&answers, &f, NULL));
    const struct session *of = f.code == MESSAGE_WELCOME ? &greeted : &active;
    hold(f.session == of->number && f.sequence == (uint16_t)of->sequence);
    hold(f.code >= MESSAGE_DONE && f.size <= port_send_max);
    hold(f.code != MESSAGE_FORWARDED || f.size <= segment.capacity);
    for (size_t i = 0; f.code == MESSAGE_FORWARDED && i < f.size; i++) {
        hold(f.body[i] < segment.classes);
    }
}

static void request(uint8_t code, uint8_t how, const uint8_t *body, size_t size) {
    static uint8_t wire[1024];
    size_t wire_size = size;
    const size_t start = sent_size;
    const int hello = code == MESSAGE_HELLO;
    const int moves = code == MESSAGE_READ || code == MESSAGE_WRITE;
    const int opens = how < REPEATED && greeted.number != 0 && greeted.number != active.number;
    const uint16_t next = (uint16_t)(active.number + 1);
    const uint16_t number = how == SESSION ? next : opens ? greeted.number : active.number;
    const uint16_t ahead = how == REPEATED ? 0 : how == LATE ? 0xFFFF : how == EARLY ? 2 : 1;
    const uint16_t after = opens || how == SESSION ? 0 : (uint16_t)active.sequence;
    const uint16_t sequence = hello ? 0 : (uint16_t)(after + ahead);
    // whether the device has to answer
    int due = number != 0 && size <= RECEIVE_MAX;
    if (how == SESSION && !hello) {
        due = due && greeted.number == number;
    } else if (how == REPEATED && !hello) {
        due = due && active.sequence != 0 && moves != acted;
    } else if (how > REPEATED && !hello) {
        due = 0;
    }
    if (how >= RAW) {
        memcpy(wire, body, size);
        wire[wire_size++] = 0;
    } else {
        frame_write(NULL, code, number, sequence, body, size, NULL, 0);
        wire_size = sent_size - start;
        hold(wire_size <= sizeof wire);
        memcpy(wire, sent + start, wire_size);
        sent_size = start; // that was the host's
        if (how == DAMAGED) {
            wire[wire_size / 2] ^= 1u << size % 8;
        }
    }
    flushed = 0;
    device_receive(wire, wire_size);
    if (how < DAMAGED) {
        hold(flushed == (due ? 1 : 0));
    }
    if (flushed == 1) {
        check_answer(start);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size) {
    power_up();
    for (size_t at = 0; at + 3 <= size;) {
        const size_t left = size - at - 3;
        const size_t body = input[at + 2] < left ? input[at + 2] : left;
        request(input[at], input[at + 1], input + at + 3, body);
        at += 3 + body;
    }
    return 0;
}

// What the device has sent for the last input; for the tests that call this file from Python.
size_t fuzz_sent(const uint8_t **bytes);

size_t fuzz_sent(const uint8_t **bytes) {
    *bytes = sent;
    return sent_size;
}
