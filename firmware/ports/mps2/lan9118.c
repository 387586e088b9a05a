// lan9118.c: registers of the SMSC LAN9118 (datasheet, revision 1.5), polled but for the arrival of
// packets; lan9118.h is the manual.
#include "ports/mps2/lan9118.h" // itself

#include <string.h>

#include "ports/mps2/machine.h" // where the chip is

// System registers, chapter 5.3.
#define REGISTER(offset) (*(volatile uint32_t *)(ETHERNET_ADDRESS + (offset)))
#define RX_DATA REGISTER(0x00u)
#define TX_DATA REGISTER(0x20u)
#define RX_STATUS REGISTER(0x40u)
#define IRQ_CFG REGISTER(0x54u)
#define INT_STS REGISTER(0x58u)
#define INT_EN REGISTER(0x5Cu)
#define BYTE_TEST REGISTER(0x64u)
#define FIFO_INT REGISTER(0x68u)
#define TX_CFG REGISTER(0x70u)
#define HW_CFG REGISTER(0x74u)
#define RX_FIFO_INF REGISTER(0x7Cu)
#define TX_FIFO_INF REGISTER(0x80u)
#define RX_DROP REGISTER(0xA0u)
#define MAC_CSR_CMD REGISTER(0xA4u)
#define MAC_CSR_DATA REGISTER(0xA8u)

#define BYTE_TEST_AWAKE 0x87654321u
#define HW_CFG_RESET 0x1u
#define HW_CFG_STORE_AND_FORWARD 0x100000u // "must be one"
#define HW_CFG_TX_FIFO_5K 0x50000u         // of 16 KB; it leaves 10,560 bytes for received packets
#define IRQ_CFG_ON_HIGH 0x111u             // enabled, active high, driven
#define INT_RX_STATUS 0x8u                 // more packets wait than FIFO_INT says
#define TX_CFG_ON 0x2u
#define TX_CFG_STATUS_OVERRUN 0x4u // how packets went out may be overwritten, we never look
#define RX_FIFO_PACKETS 0xFF0000u
#define RX_STATUS_ERROR 0x8000u
#define TX_ONLY_SEGMENT 0x3000u // the first and the last
#define TX_FIFO_EXTRA 16u       // commands, and words that begin or end at odd addresses

// Registers of the MAC, chapter 5.4, and of the PHY, 5.5.
#define MAC_BUSY 0x80000000u
#define MAC_READ 0x40000000u
#define MAC_CR 1u
#define MAC_CR_FULL_DUPLEX 0x100000u
#define MAC_CR_TX_ON 0x8u
#define MAC_CR_RX_ON 0x4u
#define MAC_ADDRH 2u
#define MAC_ADDRL 3u
#define MAC_MII_ACC 6u
#define MAC_MII_DATA 7u
#define MII_WRITE 0x803u // to the PHY inside; busy from now on
#define MII_BUSY 0x1u
#define PHY_CONTROL 0u
#define PHY_CONTROL_NEGOTIATE 0x1200u
#define PHY_OFFER 4u
#define PHY_OFFER_FULL_DUPLEX 0x141u // at 10 and 100 Mbit/s

static uint32_t dropped;

// What is read behind another access may be older than that, for up to 135 ns (tables 6.1, 6.2).
static void settle(void) {
    for (int i = 0; i < 3; i++) {
        (void)BYTE_TEST;
    }
}

static void mac_command(uint32_t command) {
    MAC_CSR_CMD = MAC_BUSY | command;
    settle();
    while ((MAC_CSR_CMD & MAC_BUSY) != 0) {
    }
}

static void mac_write(uint32_t number, uint32_t value) {
    MAC_CSR_DATA = value;
    mac_command(number);
}

static uint32_t mac_read(uint32_t number) {
    mac_command(MAC_READ | number);
    return MAC_CSR_DATA;
}

static void phy_write(uint32_t number, uint32_t value) {
    mac_write(MAC_MII_DATA, value);
    mac_write(MAC_MII_ACC, number << 6 | MII_WRITE);
    while ((mac_read(MAC_MII_ACC) & MII_BUSY) != 0) {
    }
}

void lan9118_init(const uint8_t mac[6]) {
    while (BYTE_TEST != BYTE_TEST_AWAKE) { // the first read wakes it up
    }
    HW_CFG = HW_CFG_RESET;
    settle();
    while ((HW_CFG & HW_CFG_RESET) != 0) {
    }
    HW_CFG = HW_CFG_STORE_AND_FORWARD | HW_CFG_TX_FIFO_5K;
    FIFO_INT = 0;
    IRQ_CFG = IRQ_CFG_ON_HIGH;

    uint32_t low;
    memcpy(&low, mac, 4);
    mac_write(MAC_ADDRL, low);
    mac_write(MAC_ADDRH, (uint32_t)(mac[4] | mac[5] << 8));
    // Offering full duplex alone, the MAC's duplex is right whatever the other end has.
    phy_write(PHY_OFFER, PHY_OFFER_FULL_DUPLEX);
    phy_write(PHY_CONTROL, PHY_CONTROL_NEGOTIATE);
    TX_CFG = TX_CFG_ON | TX_CFG_STATUS_OVERRUN;
    mac_write(MAC_CR, MAC_CR_FULL_DUPLEX | MAC_CR_TX_ON | MAC_CR_RX_ON);
}

int lan9118_is_empty(void) {
    settle();
    return (RX_FIFO_INF & RX_FIFO_PACKETS) == 0;
}

size_t lan9118_receive(uint8_t *packet, size_t capacity) {
    while (!lan9118_is_empty()) {
        const uint32_t status = RX_STATUS;
        const size_t size = status >> 16 & 0x3FFFu; // with CRC
        const int good = (status & RX_STATUS_ERROR) == 0 && size > 4 && size <= capacity;
        for (size_t i = 0; i < size; i += 4) { // also what is dropped has to be read
            const uint32_t word = RX_DATA;
            if (good) {
                memcpy(packet + i, &word, 4);
            }
        }
        if (good) {
            return size - 4;
        }
        dropped++;
    }
    return 0;
}

void lan9118_send(const uint8_t *packet, size_t size) {
    do {
        settle();
    } while ((TX_FIFO_INF & 0xFFFFu) < size + TX_FIFO_EXTRA);
    TX_DATA = TX_ONLY_SEGMENT | (uint32_t)size;
    TX_DATA = (uint32_t)size;
    for (size_t i = 0; i < size; i += 4) {
        uint32_t word;
        memcpy(&word, packet + i, 4);
        TX_DATA = word;
    }
}

void lan9118_expect(void) {
    INT_STS = INT_RX_STATUS;
    INT_EN = INT_RX_STATUS;
}

void lan9118_interrupt(void) {
    INT_EN = 0;
    settle(); // before the processor looks at its line again
}

uint32_t lan9118_dropped(void) {
    dropped += RX_DROP; // reading clears it
    return dropped;
}
