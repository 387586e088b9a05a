// half_check.c: a firmware that holds the conversions of halves by the core's own instructions to
// the portable ones, for the tests on boards.
//
// It writes a line for each half and each float that become other bits, then how many it compared,
// then "end".
#include <string.h>

#include "core/port.h" // link

#if !defined(__ARM_FP16_FORMAT_IEEE) || !defined(__ARM_FP)
#error "half.c has nothing but its portable functions here"
#endif

// The portable functions, under names of their own.
#undef __ARM_FP16_FORMAT_IEEE
#define half_pack portable_pack
#define half_unpack portable_unpack
#include "kernels/half.c"
#undef half_pack
#undef half_unpack

void half_pack(uint16_t *h, const float *x, size_t size);
void half_unpack(float *x, const uint16_t *h, size_t size);

static void write_line(const char *text, uint32_t number) {
    char digits[12];
    char *at = digits + sizeof digits - 1;
    *at = '\0';
    do {
        *--at = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    port_write((const uint8_t *)text, strlen(text));
    port_write((const uint8_t *)at, strlen(at));
    port_write((const uint8_t *)"\n", 1);
    port_flush();
}

#define BATCH 256

static uint16_t halves[2][BATCH];
static float singles[2][BATCH];

// In batches, as whole as in a segment.
static uint32_t compare_unpacked(void) {
    uint32_t count = 0;
    for (uint32_t first = 0; first < 1u << 16; first += BATCH) {
        for (uint32_t i = 0; i < BATCH; i++) {
            halves[0][i] = (uint16_t)(first + i);
        }
        half_unpack(singles[0], halves[0], BATCH);
        portable_unpack(singles[1], halves[0], BATCH);
        for (uint32_t i = 0; i < BATCH; i++, count++) {
            if (memcmp(&singles[0][i], &singles[1][i], sizeof(float)) != 0) {
                write_line("half ", first + i);
            }
        }
    }
    return count;
}

// The upper 16 bits of a float decide on sign, exponent and part of the fraction: all of them, each
// with lower bits around those that rounding turns on.
static const uint32_t lower[] = {
    0,      1,      0xFFF,  0x1000, 0x1001, 0x1FFF, 0x2000, 0x2FFF,
    0x3000, 0x3001, 0x5000, 0x7000, 0x8000, 0xF000, 0xFFFF,
};

static uint32_t compare_packed(void) {
    uint32_t count = 0;
    for (uint32_t first = 0; first < 1u << 16; first += BATCH) {
        for (size_t low = 0; low < sizeof lower / sizeof lower[0]; low++) {
            for (uint32_t i = 0; i < BATCH; i++) {
                const uint32_t bits = (first + i) << 16 | lower[low];
                memcpy(&singles[0][i], &bits, sizeof bits);
            }
            half_pack(halves[0], singles[0], BATCH);
            portable_pack(halves[1], singles[0], BATCH);
            for (uint32_t i = 0; i < BATCH; i++, count++) {
                if (halves[0][i] != halves[1][i]) {
                    write_line("float ", (first + i) << 16 | lower[low]);
                }
            }
        }
    }
    return count;
}

int main(int argc, char **argv) {
    port_init(argc, argv);
    write_line("unpacked ", compare_unpacked());
    write_line("packed ", compare_packed());
    port_write((const uint8_t *)"end\n", 4);
    port_flush();
    uint8_t byte;
    for (;;) {
        (void)port_read(&byte, 1);
    }
}
