// dsp_int8_add.h: the addition of a core that multiplies pairs.
#ifndef DSP_INT8_ADD_H
#define DSP_INT8_ADD_H

#include "kernels/int8.h"

// int8_add for a shift of the output of 0 or less.
void dsp_int8_add(int8_t *y, const int8_t *a, const struct int8_addend *of_a, const int8_t *b,
                  const struct int8_addend *of_b, const struct int8_output *to, size_t size);

#endif
