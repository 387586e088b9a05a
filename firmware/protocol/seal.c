// seal.c: CRC-32 and keyed tags; seal.h is the manual.
#include "protocol/seal.h" // itself

#include "protocol/bytes.h" // little endian

uint32_t seal_crc32(uint32_t crc, const uint8_t *bytes, size_t size) {
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

#ifdef KEYED

void seal_start(struct seal *seal, const struct sealing *how) {
    uint8_t first[3] = {how->direction};
    bytes_put_u16(first + 1, how->turns);
    blake2s_init(&seal->hash, SEAL_SIZE, how->key, KEY_SIZE);
    blake2s_update(&seal->hash, first, sizeof first);
}

void seal_add(struct seal *seal, const uint8_t *bytes, size_t size) {
    blake2s_update(&seal->hash, bytes, size);
}

void seal_end(struct seal *seal, uint8_t *end) {
    blake2s_final(&seal->hash, end);
}

static int same(const uint8_t *a, const uint8_t *b) {
    return blake2s_same(a, b, SEAL_SIZE);
}

#else

void seal_start(struct seal *seal, const struct sealing *how) {
    (void)how;
    seal->crc = 0;
}

void seal_add(struct seal *seal, const uint8_t *bytes, size_t size) {
    seal->crc = seal_crc32(seal->crc, bytes, size);
}

void seal_end(struct seal *seal, uint8_t *end) {
    bytes_put_u32(end, seal->crc);
}

static int same(const uint8_t *a, const uint8_t *b) {
    return bytes_get_u32(a) == bytes_get_u32(b);
}

#endif

int seal_holds(const struct sealing *how, const uint8_t *bytes, size_t size, const uint8_t *end) {
    struct seal seal;
    uint8_t ours[SEAL_SIZE];
    seal_start(&seal, how);
    seal_add(&seal, bytes, size);
    seal_end(&seal, ours);
    return same(ours, end);
}
