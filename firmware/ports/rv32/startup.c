// startup.c: what runs before main on an RV32 core: trap vectors, FPU, read-only flash, memory.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ports/rv32/rv32.h" // registers, the interrupt
#include "ports/stack.h"     // its paint

// Places that rv32.ld defines.
extern uint8_t flash_start[], ram_start[];
extern uint8_t data_start[], data_end[], data_load[], bss_start[], bss_end[];

int main(int argc, char **argv);

_Noreturn void startup_main(void);

// The core starts at startup_reset, the first address of flash.
//
// A fault is a bug or a full stack, and nothing in memory can be trusted any more: startup_fault
// uses no stack. It writes to QEMU's test device, which ends QEMU with the cause as its status
// (RISC-V Privileged Architecture, mcause: 7 is a forbidden write), and elsewhere waits for a
// watchdog.
__asm__(".section .start, \"ax\"\n"
        ".option push\n"
        ".option arch, +zicsr\n"
        ".option norvc\n" // all vectors have the same size
        ".global startup_reset\n"
        "startup_reset:\n"
        "    la sp, stack_top\n"
        "    la t0, vectors + 1\n" // + 1: a vector for each interrupt
        "    csrw mtvec, t0\n"
        "    j startup_main\n"
        "    .balign 64\n"
        "vectors:\n"
        "    j startup_fault\n" // every exception
        "    .rept 10\n"
        "    j startup_fault\n" // interrupts that are never enabled
        "    .endr\n"
        "    j rv32_external_interrupt\n"
        "startup_fault:\n"
        "    csrr t0, mcause\n"
        "    slli t0, t0, 16\n"
        "    li t1, 0x3333\n" // failed
        "    or t0, t0, t1\n"
        "    li t1, 0x100000\n"
        "    sw t0, 0(t1)\n"
        "1:  j 1b\n"
        ".option pop\n"
        ".text\n");

// Physical memory protection (RISC-V Privileged Architecture, 3.7), as byte 1 of pmpcfg0: locked,
// from pmpaddr0 up to pmpaddr1, for execution and reading. Flash in emulation is RAM, and would let
// a stack grow into it.
#define FLASH_IS_READ_ONLY (0x8Du << 8)

#define FPU_INITIAL (1u << 13) // mstatus.FS

_Noreturn void startup_main(void) {
    stack_paint();
    CSR("csrw pmpaddr0", (uintptr_t)flash_start >> 2);
    CSR("csrw pmpaddr1", (uintptr_t)ram_start >> 2);
    CSR("csrw pmpcfg0", FLASH_IS_READ_ONLY);
#ifdef __riscv_flen
    CSR("csrs mstatus", FPU_INITIAL); // the FPU is off after reset
    CSR("csrw fcsr", 0);              // rounds to nearest
#endif
    memcpy(data_start, data_load, (size_t)(data_end - data_start));
    memset(bss_start, 0, (size_t)(bss_end - bss_start));
    main(0, NULL);
    __builtin_trap(); // main has no end
}
