// rv32.h: what startup.c and rv32.c need of each other, and access to the core's registers.
#ifndef RV32_H
#define RV32_H

// What the trap vectors lead to.
void rv32_external_interrupt(void);

// Instructions on control and status registers. The assembler is told here that there are some:
// in -march, _zicsr makes gcc link a C library that was built for another ABI.
#define CSR(instruction, value)                                                                    \
    __asm volatile(".option push\n\t.option arch, +zicsr\n\t" instruction                          \
                   ", %0\n\t.option pop" ::"rK"(value)                                             \
                   : "memory")

#endif
