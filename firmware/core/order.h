// order.h: the order in which a client uses its samples: a permutation drawn from (seed, epoch).
#ifndef ORDER_H
#define ORDER_H

#include <stddef.h>
#include <stdint.h>

// Fills order[0..size-1] with the permutation of this epoch. toolkit/splitee/data.py draws the
// same.
void order_draw(uint16_t *order, size_t size, uint32_t seed, uint32_t epoch);

#endif
