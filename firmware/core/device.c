// device.c: carries out the host's requests on the segment; each answer goes back at once.
//
// A request is acted on once: the same number again is answered with the last answer, and any
// number but the next is ignored, so a lost, doubled or late frame never trains twice. Reads and
// Writes of one number are pieces of a transfer: nothing comes of carrying them out again.
#include "core/device.h" // itself

#include <string.h>

#include "core/order.h"        // data order
#include "core/port.h"         // link and clock
#include "core/segment.h"      // the network
#include "core/session.h"      // whose requests
#include "core/trainer.h"      // its batches
#include "kernels/kernels.h"   // normalize_forward
#include "protocol/codec.h"    // tensors that cross the link
#include "protocol/frame.h"    // frames
#include "protocol/messages.h" // what stands in them

#ifndef RECEIVE_MAX
#define RECEIVE_MAX 1024 // largest body of a frame received, bytes; the board's file sets it
#endif

#define ANSWER_MAX 64 // fixed fields of the longest answer, bytes

enum phase { IDLE, FORWARDED, ACCUMULATED }; // what a training batch waits for

// An answer: fixed fields here, and a tail that is sent from where it lies.
static struct answer {
    uint8_t code;
    uint8_t fields[ANSWER_MAX];
    size_t size;
    const uint8_t *tail;
    size_t tail_size;
} answer;

static uint8_t acted; // whether the last number was acted on, and the answer is the one to it

static uint8_t received[FRAME_SIZE(RECEIVE_MAX)];
static struct frame_reader reader;

static struct message_settings settings;
static struct message_place place;
static struct pass pass;
static enum phase phase;
static uint8_t cut;  // the stage that it is at the end of
static uint8_t upto; // whether all exits up to the cut learn, or only the one at it

static struct coder up, down;       // codecs of the activations and of the gradient at the cut
static struct codec_sample sending; // the sample of activations last coded, unchanged since

static uint32_t frames, repeated, compute_micros;

// answers

static void answer_fields(uint8_t code, size_t size) {
    answer.code = code;
    answer.size = size;
    answer.tail = NULL;
    answer.tail_size = 0;
}

static void answer_tail(const uint8_t *tail, size_t size) {
    answer.tail = tail;
    answer.tail_size = size;
}

static void done(void) {
    answer_fields(MESSAGE_DONE, 0);
}

static void refuse(uint8_t error, uint32_t detail) {
    const struct message_refused m = {.error = error, .detail = detail};
    message_refused_pack(&m, answer.fields);
    answer_fields(MESSAGE_REFUSED, MESSAGE_REFUSED_SIZE);
}

// Whether the segment is of 8 bits.
static int infers_only(void) {
    return segment.value_size == 1;
}

// memory

struct memory {
    uint8_t *base;
    uint32_t size;
    uint8_t writable;
};

static struct memory region_of(uint8_t which) {
    const struct stage *const last = &segment.stages[cut];
    const uint32_t held = segment.capacity;
    const uint32_t parameters = 4 * segment.parameter_size;
    const uint32_t value = segment.value_size;
    const uint32_t activations = value * held * last->activation_size;
    const uint32_t images = held * segment.input_size;
    switch (which) {
    case REGION_WEIGHTS:
        return (struct memory){(uint8_t *)segment.weights, 4 * segment.weight_size, 1};
    case REGION_MOMENTUM:
        return (struct memory){(uint8_t *)segment.momentum, segment.momentum ? parameters : 0, 1};
    case REGION_SHARD:
        return (struct memory){segment.shard, segment.samples_max * (1 + segment.input_size), 1};
    case REGION_INPUT: // the last quarter of the float tensor that the images become, or all of it
        return (struct memory){(uint8_t *)segment.input + (value - 1) * images, images,
                               phase != FORWARDED};
    case REGION_ACTIVATIONS:
        return (struct memory){(uint8_t *)last->activations, activations, 0};
    case REGION_GRADIENT:
        return (struct memory){(uint8_t *)last->gradient, last->gradient ? activations : 0, 1};
    case REGION_LOGITS:
        return (struct memory){(uint8_t *)last->logits, value * held * segment.classes, 0};
    case REGION_CODED_ACTIVATIONS: // made as they are read, of floats
        return (struct memory){(uint8_t *)last->activations,
                               infers_only() ? 0 : held * codec_size(&up), 0};
    case REGION_CODED_GRADIENT:
        if (!last->gradient) {
            return (struct memory){0};
        }
        return (struct memory){codec_place(&down, last->gradient, held), held * codec_size(&down),
                               1};
    case REGION_GRADIENTS:
        return (struct memory){(uint8_t *)segment.gradients, segment.gradients ? parameters : 0, 0};
    default: // REGION_ARENA
        return (struct memory){segment.arena, segment.arena_size, 0};
    }
}

// Finds length bytes at offset of a region, or refuses.
static int locate(uint8_t which, uint32_t offset, uint32_t length, struct memory *found) {
    if (which >= REGION_COUNT) {
        refuse(ERROR_NO_SUCH_REGION, which);
        return 0;
    }
    *found = region_of(which);
    if (offset > found->size || length > found->size - offset) {
        refuse(ERROR_OUT_OF_RANGE, found->size);
        return 0;
    }
    // What was not built in is at NULL, to which not even nothing may be added or copied.
    found->base = found->size == 0 ? segment.arena : found->base + offset;
    return 1;
}

static void store(uint8_t which, uint32_t offset, const uint8_t *bytes, size_t size) {
    struct memory to;
    if (!locate(which, offset, (uint32_t)size, &to)) {
        return;
    }
    if (!to.writable) {
        refuse(ERROR_READ_ONLY, which);
        return;
    }
    memcpy(to.base, bytes, size);
    const struct message_written m = {.offset = offset};
    message_written_pack(&m, answer.fields);
    answer_fields(MESSAGE_WRITTEN, MESSAGE_WRITTEN_SIZE);
}

// requests; the length of the body is checked

static void on_hello(const struct frame *f) {
    struct message_hello hello = {0}; // of another schema, it may be of any size
    if (f->size >= MESSAGE_HELLO_SIZE) {
        message_hello_unpack(&hello, f->body);
    }
    struct message_welcome w = {
        .schema = MESSAGES_SCHEMA,
        .segment = segment.checksum,
        .receive_max = RECEIVE_MAX,
        .send_max = port_send_max,
        .window = port_window,
        .samples_max = segment.samples_max,
        .samples = place.samples,
        .steps = place.steps,
        .shard = seal_crc32(0, segment.shard, place.samples * (size_t)(1 + segment.input_size)),
    };
    session_greet(f->session, &hello, &w);
    message_welcome_pack(&w, answer.fields);
    answer_fields(MESSAGE_WELCOME, MESSAGE_WELCOME_SIZE);
}

// Puts the cut at the end of a stage, where its tensors cross as they are.
static void move(unsigned stage, int all_exits) {
    cut = (uint8_t)stage;
    upto = all_exits != 0;
    up = (struct coder){.kind = CODEC_FLOAT32, .elements = segment.stages[cut].activation_size};
    down = up;
    sending.x = NULL;
}

static void on_select(const uint8_t *body, size_t size) {
    (void)size;
    struct message_select m;
    message_select_unpack(&m, body);
    if (phase != IDLE) {
        refuse(ERROR_OUT_OF_ORDER, phase);
    } else if (m.cut == 0 || m.cut > segment.cuts) {
        refuse(ERROR_NO_SUCH_CUT, segment.cuts);
    } else {
        move(m.cut - 1u, m.upto);
        done();
    }
}

static void on_coding(const uint8_t *body, size_t size) {
    (void)size;
    struct message_coding m;
    message_coding_unpack(&m, body);
    const uint32_t elements = segment.stages[cut].activation_size;
    const struct coder activations = {m.activations, m.kept, elements};
    const struct coder gradient = {m.gradient, m.kept, elements};
    if (phase != IDLE) {
        refuse(ERROR_OUT_OF_ORDER, phase);
    } else if (!codec_fits(&activations)) {
        refuse(ERROR_BAD_CODEC, m.activations);
    } else if (!codec_fits(&gradient)) {
        refuse(ERROR_BAD_CODEC, m.gradient);
    } else {
        up = activations;
        down = gradient;
        sending.x = NULL;
        done();
    }
}

static void on_settings(const uint8_t *body, size_t size) {
    (void)size;
    struct message_settings m;
    message_settings_unpack(&m, body);
    if (m.momentum != 0.0f && segment.momentum == NULL) {
        refuse(ERROR_NO_MOMENTUM, 0);
        return;
    }
    if (m.clip != 0.0f && segment.gradients == NULL) {
        refuse(ERROR_NO_CLIP, 0);
        return;
    }
    if (m.server_weight != 0.0f && segment.stages[cut].gradient == NULL) {
        refuse(ERROR_LOCAL_ONLY, 0);
        return;
    }
    if (m.distill != 0.0f && !segment.distills) {
        refuse(ERROR_NO_DISTILL, 0);
        return;
    }
    settings = m;
    done();
}

static void on_place(const uint8_t *body, size_t size) {
    (void)size;
    struct message_place m;
    message_place_unpack(&m, body);
    if (m.samples > segment.samples_max || m.position > m.samples) {
        refuse(ERROR_TOO_MANY_SAMPLES, segment.samples_max);
        return;
    }
    place = m;
    phase = IDLE;
    order_draw(segment.order, place.samples, place.seed, place.epoch);
    if (place.steps == 0 && segment.momentum != NULL) {
        memset(segment.momentum, 0, segment.parameter_size * sizeof(float));
    }
    done();
}

// Copies count samples of the data order, from first on, to the input; 0 when a label is bad.
static int load(size_t first, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const uint8_t *record =
            segment.shard + segment.order[first + i] * (1 + (size_t)segment.input_size);
        if (record[0] >= segment.classes) {
            refuse(ERROR_BAD_LABEL, record[0]);
            return 0;
        }
        trainer_put(i, record[0], record + 1);
    }
    return 1;
}

// The segment computes between these two.
static uint32_t start(void) {
    sending.x = NULL;
    return port_micros();
}

static void stop(uint32_t started) {
    compute_micros += port_micros() - started;
}

static void on_forward(const uint8_t *body, size_t size) {
    (void)size;
    struct message_forward m;
    message_forward_unpack(&m, body);
    if (phase == FORWARDED) {
        refuse(ERROR_OUT_OF_ORDER, phase);
        return;
    }
    if (place.samples == 0) {
        refuse(ERROR_NO_DATA, 0);
        return;
    }
    if (m.count == 0 || m.count > segment.capacity || m.count > m.batch) {
        refuse(ERROR_TOO_MANY_SAMPLES, segment.capacity);
        return;
    }
    if (!segment.gradients && m.count != m.batch) {
        refuse(ERROR_NOT_WHOLE, segment.capacity); // layers learn from each part at once
        return;
    }
    const int ended = place.position == place.samples;
    const uint32_t left = ended ? place.samples : (uint32_t)(place.samples - place.position);
    if (m.count > left) {
        refuse(ERROR_TOO_MANY_SAMPLES, left);
        return;
    }
    if (ended) {
        place.position = 0;
        place.epoch++;
        order_draw(segment.order, place.samples, place.seed, place.epoch);
    }
    if (!load(place.position, m.count)) {
        return;
    }
    const uint32_t started = start();
    if (phase == IDLE) {
        pass = (struct pass){.cut = cut, .upto = upto, .settings = &settings};
        trainer_begin(&pass);
    }
    trainer_forward(&pass, m.count, m.batch);
    stop(started);
    place.position = (uint16_t)(place.position + m.count);
    phase = FORWARDED;
    answer_fields(MESSAGE_FORWARDED, MESSAGE_FORWARDED_SIZE);
    answer_tail(segment.labels, m.count);
}

static void on_infer(const uint8_t *body, size_t size) {
    (void)size;
    struct message_infer m;
    message_infer_unpack(&m, body);
    if (phase == FORWARDED) {
        refuse(ERROR_OUT_OF_ORDER, phase);
        return;
    }
    if (m.count == 0 || m.count > segment.capacity) {
        refuse(ERROR_TOO_MANY_SAMPLES, segment.capacity);
        return;
    }
    if (!infers_only()) {
        normalize_forward(segment.input, region_of(REGION_INPUT).base, segment.scale, segment.shift,
                          segment.channels, segment.input_size / segment.channels, m.count);
    }
    struct pass answers = {.cut = cut, .upto = upto}; // beside that of a batch that is under way
    const uint32_t started = start();
    trainer_infer(&answers, m.count);
    stop(started);
    done();
}

static void on_backward(const uint8_t *body, size_t size) {
    (void)body;
    (void)size;
    if (phase != FORWARDED) {
        refuse(ERROR_OUT_OF_ORDER, phase);
        return;
    }
    float *const gradient = segment.stages[cut].gradient;
    if (gradient && down.kind != CODEC_FLOAT32 && settings.server_weight != 0.0f) {
        const uint32_t good = codec_decode(&down, gradient, segment.capacity, (uint32_t)pass.count);
        if (good < pass.count) {
            refuse(ERROR_BAD_CODE, good);
            return;
        }
    }
    const uint32_t started = start();
    trainer_backward(&pass);
    stop(started);
    phase = ACCUMULATED;
    done();
}

static void on_step(const uint8_t *body, size_t size) {
    (void)body;
    (void)size;
    if (phase != ACCUMULATED) {
        refuse(ERROR_OUT_OF_ORDER, phase);
        return;
    }
    const uint32_t started = start();
    const int taken = trainer_step(&pass);
    stop(started);
    phase = IDLE; // the next Forward begins a batch, also where this one taught nothing
    if (!taken) {
        refuse(ERROR_NOT_FINITE, pass.bad);
        return;
    }
    place.steps++;
    const struct message_stepped s = {.loss = pass.loss, .correct = (uint16_t)pass.correct};
    message_stepped_pack(&s, answer.fields);
    answer_fields(MESSAGE_STEPPED, MESSAGE_STEPPED_SIZE);
}

static void on_read(const uint8_t *body, size_t size) {
    (void)size;
    struct message_read m;
    message_read_unpack(&m, body);
    struct memory from;
    const int coded = m.region == REGION_CODED_ACTIVATIONS;
    const uint32_t sent = port_send_max - MESSAGE_CONTENT_SIZE;
    const uint32_t most = coded && sent > RECEIVE_MAX ? RECEIVE_MAX : sent;
    if (m.length > most) {
        refuse(ERROR_OUT_OF_RANGE, most);
    } else if (locate(m.region, m.offset, m.length, &from)) {
        if (coded) { // into the memory of the request, which is done with
            codec_encode(&up, &sending, segment.stages[cut].activations, m.offset, received,
                         m.length);
            from.base = received;
        }
        const struct message_content c = {.offset = m.offset};
        message_content_pack(&c, answer.fields);
        answer_fields(MESSAGE_CONTENT, MESSAGE_CONTENT_SIZE);
        answer_tail(from.base, m.length);
    }
}

static void on_write(const uint8_t *body, size_t size) {
    struct message_write m;
    message_write_unpack(&m, body);
    store(m.region, m.offset, body + MESSAGE_WRITE_SIZE, size - MESSAGE_WRITE_SIZE);
}

static void on_stats(const uint8_t *body, size_t size) {
    (void)body;
    (void)size;
    const struct message_counters c = {
        .samples = place.samples,
        .position = place.position,
        .seed = place.seed,
        .epoch = place.epoch,
        .steps = place.steps,
        .frames = frames,
        .bad_frames = reader.bad,
        .foreign_frames = session_foreign(),
        .repeated_frames = repeated,
        .compute_micros = compute_micros,
        .stack_used = port_stack_used(),
        .dropped_packets = port_dropped(),
    };
    message_counters_pack(&c, answer.fields);
    answer_fields(MESSAGE_COUNTERS, MESSAGE_COUNTERS_SIZE);
}

// The part of the last forward again: the passes since may have reused the input's memory.
static int reload(void) {
    pass.loss = 0.0f;
    pass.correct = 0;
    return load((size_t)place.position - pass.count, pass.count);
}

// Single steps are for looking at the tensors of a batch of one part: after its forward, the host
// runs every step again in order and then sends Step.
static void on_run(const uint8_t *body, size_t size) {
    (void)size;
    struct message_run m;
    message_run_unpack(&m, body);
    if (phase != FORWARDED) {
        refuse(ERROR_OUT_OF_ORDER, phase);
    } else if (m.start > m.stop || m.stop > segment.backward_end) {
        refuse(ERROR_BAD_STEP, segment.backward_end);
    } else if (m.start > 0 || reload()) {
        const uint32_t started = start();
        trainer_run(&pass, m.start, m.stop);
        stop(started);
        phase = m.stop == segment.backward_end ? ACCUMULATED : phase;
        done();
    }
}

enum { ANY, TRAINS }; // which segments a request is for: any, or those that can be trained

// What there is to ask for: a body has at least size bytes, and more only where a tail may follow.
static const struct {
    uint8_t code;
    uint8_t trains;
    uint8_t size;
    uint8_t tail;
    void (*on)(const uint8_t *body, size_t size);
} requests[] = {
    {MESSAGE_SELECT, ANY, MESSAGE_SELECT_SIZE, MESSAGE_SELECT_TAIL, on_select},
    {MESSAGE_CODING, TRAINS, MESSAGE_CODING_SIZE, MESSAGE_CODING_TAIL, on_coding},
    {MESSAGE_SETTINGS, TRAINS, MESSAGE_SETTINGS_SIZE, MESSAGE_SETTINGS_TAIL, on_settings},
    {MESSAGE_PLACE, TRAINS, MESSAGE_PLACE_SIZE, MESSAGE_PLACE_TAIL, on_place},
    {MESSAGE_FORWARD, TRAINS, MESSAGE_FORWARD_SIZE, MESSAGE_FORWARD_TAIL, on_forward},
    {MESSAGE_INFER, ANY, MESSAGE_INFER_SIZE, MESSAGE_INFER_TAIL, on_infer},
    {MESSAGE_BACKWARD, TRAINS, MESSAGE_BACKWARD_SIZE, MESSAGE_BACKWARD_TAIL, on_backward},
    {MESSAGE_STEP, TRAINS, MESSAGE_STEP_SIZE, MESSAGE_STEP_TAIL, on_step},
    {MESSAGE_READ, ANY, MESSAGE_READ_SIZE, MESSAGE_READ_TAIL, on_read},
    {MESSAGE_WRITE, ANY, MESSAGE_WRITE_SIZE, MESSAGE_WRITE_TAIL, on_write},
    {MESSAGE_STATS, ANY, MESSAGE_STATS_SIZE, MESSAGE_STATS_TAIL, on_stats},
    {MESSAGE_RUN, TRAINS, MESSAGE_RUN_SIZE, MESSAGE_RUN_TAIL, on_run},
};

static void act(const struct frame *f) {
    for (size_t i = 0; i < sizeof requests / sizeof requests[0]; i++) {
        if (requests[i].code == f->code) {
            const size_t size = requests[i].size;
            if (requests[i].trains && infers_only()) {
                refuse(ERROR_INFERS_ONLY, 0);
            } else if (f->size < size || (f->size > size && !requests[i].tail)) {
                refuse(ERROR_BAD_LENGTH, (uint32_t)f->size);
            } else {
                requests[i].on(f->body, f->size);
            }
            return;
        }
    }
    refuse(ERROR_UNKNOWN_MESSAGE, f->code);
}

static void send(enum turn turn) {
    session_answer(turn, answer.code, answer.fields, answer.size, answer.tail, answer.tail_size);
}

static void on_frame(const struct frame *f) {
    const int moves = f->code == MESSAGE_READ || f->code == MESSAGE_WRITE;
    const enum turn turn = session_take(&reader, f);
    frames += turn != TURN_NONE;
    repeated += turn == TURN_AGAIN && !moves;
    if (turn == TURN_NONE || (turn == TURN_AGAIN && moves == acted)) {
        return; // the number of an act is no other's
    }
    if (turn == TURN_FIRST) {
        phase = IDLE;
    }
    if (turn == TURN_HELLO || moves) {
        const struct answer kept = answer; // what was acted on last may come again
        if (moves) {
            acted = 0;
            act(f);
        } else {
            on_hello(f);
        }
        send(turn);
        answer = kept;
        return;
    }
    if (turn != TURN_AGAIN) {
        acted = 1;
        act(f);
    }
    send(turn);
}

void device_init(void) {
    move(segment.cuts - 1u, 1);
    session_init();
    frame_reader_init(&reader, received, sizeof received);
}

void device_receive(const uint8_t *bytes, size_t size) {
    struct frame f;
    for (size_t i = 0; i < size; i++) {
        if (frame_read(&reader, bytes[i], &f)) {
            on_frame(&f);
        }
    }
}
