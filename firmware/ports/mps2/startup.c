// startup.c: what runs before main on an MPS2 or MPS3 board: vector table, FPU, .data and .bss.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ports/mps2/machine.h" // where the interrupts of links stand
#include "ports/mps2/mps2.h"    // the interrupts
#include "ports/stack.h"        // its paint

// Places that mps2.ld defines.
extern uint8_t data_start[], data_end[], data_load[], bss_start[], bss_end[];

int main(int argc, char **argv);

_Noreturn void startup_reset(void);
_Noreturn void startup_fault(void);

// A fault is a bug or a full stack, and nothing in memory can be trusted any more. A second fault
// here locks the core up, where a debugger finds it and a watchdog ends it; QEMU ends with a
// report.
_Noreturn void startup_fault(void) {
    __builtin_trap();
}

_Noreturn void startup_reset(void) {
    stack_paint();
#ifdef __ARM_FP
    volatile uint32_t *const cpacr = (volatile uint32_t *)0xE000ED88u;
    *cpacr |= 0xFu << 20; // the FPU, and vectors with it, are off after reset
    __asm volatile("dsb\n\tisb" ::: "memory");
#endif
    memcpy(data_start, data_load, (size_t)(data_end - data_start));
    memset(bss_start, 0, (size_t)(bss_end - bss_start));
    main(0, NULL);
    startup_fault(); // main has no end
}

// An entry of the vector table: the first is the stack's top, all others are code.
union vector {
    void *stack;
    void (*code)(void);
};

__attribute__((section(".vectors"), used)) static const union vector vectors[] = {
    {.stack = stack_top},
    {.code = startup_reset},
    {.code = startup_fault}, // NMI
    {.code = startup_fault}, // HardFault
    {.code = startup_fault}, // MemManage
    {.code = startup_fault}, // BusFault
    {.code = startup_fault}, // UsageFault
    {.code = startup_fault}, // SecureFault on Armv8-M, otherwise reserved
    {.code = startup_fault}, // 3 reserved ones
    {.code = startup_fault},
    {.code = startup_fault},
    {.code = startup_fault}, // SVCall
    {.code = startup_fault}, // DebugMonitor
    {.code = startup_fault}, // reserved
    {.code = startup_fault}, // PendSV
    [15] = {.code = mps2_systick_interrupt},
    // One of these two is the link that is built in; no other is ever enabled.
    [16 + UART0_RECEIVE] = {.code = mps2_link_interrupt},
    [16 + ETHERNET_INTERRUPT] = {.code = mps2_link_interrupt},
};
