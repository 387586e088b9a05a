// codec.h: tensors as they cross the link; toolkit/splitee/codec.py defines the bytes, and both
// ends make the same, bit for bit.
//
// Codes are made piece by piece, straight into what is sent, and decoded in the place of the tensor
// that they become: no codec needs memory of its own.
#ifndef CODEC_H
#define CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "protocol/messages.h" // enum codec

// A codec for samples of one size.
struct coder {
    uint8_t kind;      // enum codec
    uint16_t kept;     // elements of a sample that CODEC_TOP_K keeps
    uint32_t elements; // of a sample, at least one
};

// What is known of a sample while it is being coded; all zero before the first one.
struct codec_sample {
    const float *x; // NULL: of none
    float scale;
    float inverse; // 1 / scale; 0 where every number is 0
    // Of CODEC_TOP_K: the smallest magnitude kept and how many of just that size are, then the
    // pair last found: its number and index, and the equals left behind it.
    uint32_t least, equals;
    uint32_t pair, index, left;
};

// Bytes of a sample's code.
uint32_t codec_size(const struct coder *c);

// Whether there is such a codec and it is one for samples of this size: their code takes no more
// than they do as float32. The other functions take no codec that is not.
int codec_fits(const struct coder *c);

// Writes bytes first..first+size-1 of the code of samples that follow one another at x. known goes
// from piece to piece; set known->x to NULL when a sample may have changed.
void codec_encode(const struct coder *c, struct codec_sample *known, const float *x, uint32_t first,
                  uint8_t *to, size_t size);

// Where the code of up to held samples lies in the memory of so many at x, to be decoded there: at
// its end.
uint8_t *codec_place(const struct coder *c, float *x, uint32_t held);

// Decodes count of the held samples whose code lies at codec_place. Returns how many are codes at
// all: where that is less than count, nothing has changed.
uint32_t codec_decode(const struct coder *c, float *x, uint32_t held, uint32_t count);

#endif
