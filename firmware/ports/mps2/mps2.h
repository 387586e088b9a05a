// mps2.h: the interrupts that the vector table (startup.c) leads to mps2.c.
#ifndef MPS2_H
#define MPS2_H

void mps2_uart_interrupt(void);
void mps2_systick_interrupt(void);

#endif
