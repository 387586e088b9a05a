// hash.c: a program that checks messages of several sizes and writes what each took: by a CRC-32,
// as every frame has it, and by BLAKE2s with a key and a tag of 16 bytes.
//
// splitee_host/bench.py builds it around a port, runs it where virtual time counts instructions,
// and reads the lines: name bytes microseconds, times REPEATS; "end" is the last line.
#include "bench/shapes.h"     // repeats
#include "bench/text.h"       // words and numbers
#include "core/port.h"        // clock and link
#include "protocol/blake2s.h" // what is measured
#include "protocol/seal.h"    // and what it is compared with

static uint8_t message[1400];
static uint32_t checksum;

static void by_crc32(size_t size) {
    checksum = seal_crc32(0, message, size);
}

static void by_blake2s(size_t size) {
    static const uint8_t key[BLAKE2S_KEY_MAX] = {1, 2, 3};
    static uint8_t tag[16];
    struct blake2s hash;
    blake2s_init(&hash, sizeof tag, key, sizeof key);
    blake2s_update(&hash, message, size);
    blake2s_final(&hash, tag);
}

static void report(const char *name, void (*by)(size_t size), size_t size) {
    const uint32_t before = port_micros();
    for (int i = 0; i < REPEATS; i++) {
        by(size);
    }
    const uint32_t micros = port_micros() - before;
    write_text(name);
    write_number((uint32_t)size);
    write_number(micros);
    write_text("\n");
    port_flush();
}

int main(int argc, char **argv) {
    static const uint16_t sizes[] = {16, 64, 256, 1400};
    port_init(argc, argv);
    for (size_t i = 0; i < sizeof message; i++) {
        message[i] = (uint8_t)(37 * i);
    }
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        report("crc32", by_crc32, sizes[i]);
        report("blake2s", by_blake2s, sizes[i]);
    }
    write_text("end\n");
    port_flush();
    uint8_t byte;
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
