// machine.h: where the MPS2 and MPS3 boards differ; a board's file names its own, as -DMPS2_AN386.
// From Arm's application notes of these numbers, and QEMU's clocks.
#ifndef MPS2_MACHINE_H
#define MPS2_MACHINE_H

#if defined MPS2_AN385 || defined MPS2_AN386 || defined MPS2_AN500 // Cortex-M3, M4, M7
#define CORE_HZ 25000000u                                          // and SysTick's
#define UART0_HZ 25000000u
#define UART0_ADDRESS 0x40004000u
#define UART0_RECEIVE 0u // interrupt
#define FPGAIO_ADDRESS 0x40028000u
#if defined MPS2_AN500
#define ETHERNET_ADDRESS 0xA0000000u
#else
#define ETHERNET_ADDRESS 0x40200000u
#endif
#define ETHERNET_INTERRUPT 13u
#elif defined MPS2_AN505 // Cortex-M33, which starts and stays in its secure state
#define CORE_HZ 20000000u
#define UART0_HZ 20000000u
#define UART0_ADDRESS 0x50200000u
#define UART0_RECEIVE 32u
#define FPGAIO_ADDRESS 0x50302000u
#define ETHERNET_ADDRESS 0x52000000u
#define ETHERNET_INTERRUPT 48u
#elif defined MPS3_AN547 // Cortex-M55, secure as well
#define CORE_HZ 32000000u
#define UART0_HZ 25000000u
#define UART0_ADDRESS 0x59303000u
#define UART0_RECEIVE 33u
#define FPGAIO_ADDRESS 0x59302000u
#define ETHERNET_ADDRESS 0x51400000u
#define ETHERNET_INTERRUPT 49u
#else
#error "the board's cflags name no machine: add -DMPS2_AN386 or another of machine.h"
#endif

#endif
