// bytes.h: numbers of the wire, little endian and at any address, read and written byte by byte.
#ifndef BYTES_H
#define BYTES_H

#include <stdint.h>
#include <string.h> // memcpy

static inline uint8_t bytes_get_u8(const uint8_t *at) {
    return at[0];
}

static inline uint16_t bytes_get_u16(const uint8_t *at) {
    return (uint16_t)(at[0] | at[1] << 8);
}

static inline uint32_t bytes_get_u32(const uint8_t *at) {
    return bytes_get_u16(at) | (uint32_t)bytes_get_u16(at + 2) << 16;
}

static inline uint64_t bytes_get_u64(const uint8_t *at) {
    return bytes_get_u32(at) | (uint64_t)bytes_get_u32(at + 4) << 32;
}

static inline float bytes_get_f32(const uint8_t *at) {
    uint32_t bits = bytes_get_u32(at);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void bytes_put_u8(uint8_t *at, uint8_t value) {
    at[0] = value;
}

static inline void bytes_put_u16(uint8_t *at, uint16_t value) {
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static inline void bytes_put_u32(uint8_t *at, uint32_t value) {
    bytes_put_u16(at, (uint16_t)value);
    bytes_put_u16(at + 2, (uint16_t)(value >> 16));
}

static inline void bytes_put_u64(uint8_t *at, uint64_t value) {
    bytes_put_u32(at, (uint32_t)value);
    bytes_put_u32(at + 4, (uint32_t)(value >> 32));
}

static inline void bytes_put_f32(uint8_t *at, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bytes_put_u32(at, bits);
}

#endif
