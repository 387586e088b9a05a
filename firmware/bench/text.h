// text.h: words and numbers over the link, for programs that say what they measured.
#ifndef TEXT_H
#define TEXT_H

#include <stdint.h>
#include <string.h> // strlen

#include "core/port.h" // link

static inline void write_text(const char *text) {
    port_write((const uint8_t *)text, strlen(text));
}

// With a space in front.
static inline void write_number(uint32_t number) {
    char digits[12];
    char *at = digits + sizeof digits - 1;
    *at = '\0';
    do {
        *--at = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    write_text(" ");
    write_text(at);
}

#endif
