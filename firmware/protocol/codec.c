// codec.c: encoders and decoders; codec.h is the manual, splitee/codec.py says why the bytes are
// so.
//
// No sum follows a product here, so that the compiler has none to fuse: what is rounded once on one
// machine and twice on another would not be the same bytes.
#include "protocol/codec.h" // itself

#include "kernels/kernels.h" // half_pack, half_unpack
#include "protocol/bytes.h"  // little endian

typedef uint32_t __attribute__((may_alias)) word; // the bits of a float

#define SCALE_SIZE 4u
#define INDICES 65536u // elements that a uint16 can tell apart

#define SMALLEST 0x17800000u // the bits of 2^-80
#define LARGEST 0x7F000000u  // the bits of 2^127
#define EXPONENT 0x7F800000u
#define NOT_A_NUMBER 0x7FC00000u
#define TO_HALF (14u << 23) // how far the largest exponent is above that of a float16's scale

// Bytes of a unit of the code behind the scale: an element, two by CODEC_INT4, a pair.
static uint32_t unit_size(uint8_t kind) {
    static const uint8_t sizes[] = {4, 2, 1, 1, 4};
    return sizes[kind];
}

uint32_t codec_size(const struct coder *c) {
    switch (c->kind) {
    case CODEC_FLOAT32:
        return 4 * c->elements;
    case CODEC_INT4:
        return SCALE_SIZE + (c->elements + 1) / 2;
    case CODEC_TOP_K:
        return SCALE_SIZE + 4u * c->kept;
    default:
        return SCALE_SIZE + unit_size(c->kind) * c->elements;
    }
}

int codec_fits(const struct coder *c) {
    if (c->kind > CODEC_TOP_K) {
        return 0;
    }
    if (c->kind == CODEC_TOP_K && (c->kept == 0 || c->elements > INDICES)) {
        return 0;
    }
    return codec_size(c) <= 4 * c->elements;
}

// ---- encoding ----

// The bits without the sign: they order as the magnitudes do, infinity and NaN above all.
static inline uint32_t magnitude(const float *x) {
    return *(const word *)x & 0x7FFFFFFFu;
}

static uint32_t largest(const float *x, uint32_t size) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < size; i++) {
        const uint32_t m = magnitude(x + i);
        found = m > found ? m : found;
    }
    return found;
}

static float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float scale_of(uint8_t kind, uint32_t bits) {
    switch (kind) {
    case CODEC_INT8:
        return of_bits(bits) / 127.0f;
    case CODEC_INT4:
        return of_bits(bits) / 7.0f;
    default:
        return of_bits((bits & EXPONENT) - TO_HALF);
    }
}

// The magnitude of which, or of a larger one, there are kept elements at least and which is the
// largest of that kind; how many of just this size are among the first kept. Four bits at a time
// from the top: so many begin as the magnitude sought does up to there, and beyond.
static void find_least(const struct coder *c, struct codec_sample *s) {
    uint32_t wanted = c->kept;
    uint32_t least = 0;
    for (unsigned shift = 32; shift > 0;) {
        uint32_t counts[16] = {0};
        shift -= 4;
        const uint32_t known = shift < 28 ? ~0u << (shift + 4) : 0;
        for (uint32_t i = 0; i < c->elements; i++) {
            const uint32_t m = magnitude(s->x + i);
            counts[m >> shift & 15] += (m & known) == least;
        }
        unsigned digit = 15;
        while (digit > 0 && counts[digit] < wanted) {
            wanted -= counts[digit--];
        }
        least |= digit << shift;
    }
    s->least = least;
    s->equals = wanted;
}

// The first element from i on that is kept; there is one, and the last needs no look.
static void find_pair(const struct coder *c, struct codec_sample *s, uint32_t i) {
    const uint32_t last = c->elements - 1;
    for (; i < last; i++) {
        const uint32_t m = magnitude(s->x + i);
        if (m > s->least || (m == s->least && s->left > 0)) {
            s->left -= m == s->least;
            break;
        }
    }
    s->index = i < last ? i : last;
}

static void begin_pairs(const struct coder *c, struct codec_sample *s) {
    s->pair = 0;
    s->left = s->equals;
    find_pair(c, s, 0);
}

static void look_at(const struct coder *c, struct codec_sample *s, const float *x) {
    const uint32_t bits = largest(x, c->elements);
    *s = (struct codec_sample){.x = x};
    if (bits >= SMALLEST && bits < LARGEST) {
        s->scale = scale_of(c->kind, bits);
        s->inverse = 1.0f / s->scale;
    } else if (bits >= LARGEST) {
        s->scale = of_bits(NOT_A_NUMBER);
    }
    if (c->kind == CODEC_TOP_K) {
        find_least(c, s);
        begin_pairs(c, s);
    }
}

static float number(const struct codec_sample *s, uint32_t i) {
    return s->inverse != 0 ? s->x[i] * s->inverse : 0;
}

// The nearest integer, of two as near the even one; |x| < 2^22.
static int32_t nearest(float x) {
    const uint32_t bits = *(const word *)&x;
    const uint32_t exponent = bits >> 23 & 0xFF;
    if (exponent < 126) { // below a half
        return 0;
    }
    const uint32_t shift = 150 - exponent; // of the point in 24 bits
    const uint32_t fraction = (bits & 0x7FFFFF) | 0x800000;
    const uint32_t odd = fraction >> shift & 1;
    const int32_t found = (int32_t)((fraction + (1u << (shift - 1)) - 1 + odd) >> shift);
    return bits >> 31 ? -found : found;
}

static void put_half(uint8_t *to, const struct codec_sample *s, uint32_t i) {
    const float x = number(s, i);
    uint16_t half;
    half_pack(&half, &x, 1);
    bytes_put_u16(to, half);
}

// The bytes of one unit.
static void put_unit(const struct coder *c, struct codec_sample *s, uint32_t i, uint8_t *to) {
    switch (c->kind) {
    case CODEC_FLOAT16:
        put_half(to, s, i);
        return;
    case CODEC_INT8:
        to[0] = (uint8_t)nearest(number(s, i));
        return;
    case CODEC_INT4: {
        const uint32_t low = (uint32_t)nearest(number(s, 2 * i)) & 15;
        const uint32_t second = 2 * i + 1;
        const uint32_t high = second < c->elements ? (uint32_t)nearest(number(s, second)) & 15 : 0;
        to[0] = (uint8_t)(low | high << 4);
        return;
    }
    default: // CODEC_TOP_K
        if (i < s->pair) {
            begin_pairs(c, s);
        }
        for (; s->pair < i; s->pair++) {
            find_pair(c, s, s->index + 1);
        }
        bytes_put_u16(to, (uint16_t)s->index);
        put_half(to + 2, s, s->index);
    }
}

// Bytes first..first+size-1 of one sample's code.
static void encode_sample(const struct coder *c, struct codec_sample *s, size_t first, uint8_t *to,
                          size_t size) {
    const size_t each = unit_size(c->kind);
    while (size > 0) {
        uint8_t bytes[4]; // the scale or a unit, of which a piece may have a part
        size_t start = first, length = SCALE_SIZE;
        if (first < SCALE_SIZE) {
            bytes_put_f32(bytes, s->scale);
        } else {
            uint32_t unit = (uint32_t)((first - SCALE_SIZE) / each);
            start = (first - SCALE_SIZE) % each;
            for (; start == 0 && size >= each; size -= each, first += each, to += each) {
                put_unit(c, s, unit++, to);
            }
            if (size == 0) {
                return;
            }
            length = each;
            put_unit(c, s, unit, bytes);
        }
        const size_t count = size < length - start ? size : length - start;
        memcpy(to, bytes + start, count);
        first += count;
        to += count;
        size -= count;
    }
}

void codec_encode(const struct coder *c, struct codec_sample *known, const float *x, uint32_t first,
                  uint8_t *to, size_t size) {
    if (c->kind == CODEC_FLOAT32) {
        memcpy(to, (const uint8_t *)x + first, size);
        return;
    }
    const uint32_t each = codec_size(c);
    while (size > 0) {
        const float *const sample = x + (size_t)(first / each) * c->elements;
        const uint32_t start = first % each;
        const size_t length = size < each - start ? size : each - start;
        if (known->x != sample) {
            look_at(c, known, sample);
        }
        encode_sample(c, known, start, to, length);
        to += length;
        first += (uint32_t)length;
        size -= length;
    }
}

// ---- decoding ----

uint8_t *codec_place(const struct coder *c, float *x, uint32_t held) {
    return (uint8_t *)(x + (size_t)held * c->elements) - (size_t)held * codec_size(c);
}

// Whether the indices of a sample's pairs rise and are below elements.
static int rises(const struct coder *c, const uint8_t *pairs) {
    uint32_t least = 0;
    for (uint32_t i = 0; i < c->kept; i++) {
        const uint32_t index = bytes_get_u16(pairs + 4 * i);
        if (index < least || index >= c->elements) {
            return 0;
        }
        least = index + 1;
    }
    return 1;
}

static float half_at(const uint8_t *from) {
    const uint16_t half = bytes_get_u16(from);
    float value;
    half_unpack(&value, &half, 1);
    return value;
}

// From front to back: what is written never reaches what is yet to be read, for of any rest of the
// code there is no more than of the floats that it becomes.
static void decode_sample(const struct coder *c, float *x, const uint8_t *code) {
    const float scale = bytes_get_f32(code);
    uint32_t pairs = 0;
    code += SCALE_SIZE;
    for (uint32_t i = 0; i < c->elements; i++) {
        float value = 0;
        switch (c->kind) {
        case CODEC_FLOAT16:
            value = half_at(code + 2 * i) * scale;
            break;
        case CODEC_INT8:
            value = (float)(int8_t)code[i] * scale;
            break;
        case CODEC_INT4: {
            const int8_t high = (int8_t)(i % 2 ? code[i / 2] : code[i / 2] << 4);
            value = (float)(high >> 4) * scale;
            break;
        }
        default: // CODEC_TOP_K
            if (pairs < c->kept && bytes_get_u16(code + 4 * pairs) == i) {
                value = half_at(code + 4 * pairs + 2) * scale;
                pairs++;
            }
        }
        x[i] = value;
    }
}

uint32_t codec_decode(const struct coder *c, float *x, uint32_t held, uint32_t count) {
    const uint8_t *const code = codec_place(c, x, held);
    const uint32_t each = codec_size(c);
    for (uint32_t i = 0; c->kind == CODEC_TOP_K && i < count; i++) {
        if (!rises(c, code + (size_t)i * each + SCALE_SIZE)) {
            return i;
        }
    }
    for (uint32_t i = 0; c->kind != CODEC_FLOAT32 && i < count; i++) {
        decode_sample(c, x + (size_t)i * c->elements, code + (size_t)i * each);
    }
    return count;
}
