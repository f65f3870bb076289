/* Emulates the instructions of AMX that multiply bfloat16 values, on processors without AMX.
 *
 * Such a processor raises SIGILL at each of them. The handler decodes the instruction, does what Intel's manual
 * (Software Developer's Manual, volume 2) says, and continues after it. Products differ from the manual in their
 * rounding: they are added one after the other. All other instructions run natively.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64 };

struct state {
    int configured;
    uint8_t rows[TILES];
    uint16_t bytes[TILES];
    uint8_t data[TILES][MAX_ROWS][MAX_BYTES];
};

/* SIGILL comes from an instruction of a kernel, never from inside malloc, so the handler may use this. */
static __thread struct state own;
static long products;

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct operand {
    uint64_t address;
    uint64_t stride;
    int length; /* bytes of SIB and displacement */
};

static struct operand decode(const uint8_t *modrm, const uint8_t *vex, const greg_t *registers) {
    int mode = modrm[0] >> 6, rm = modrm[0] & 7;
    int extend_index = !(vex[1] & 0x40) * 8, extend_base = !(vex[1] & 0x20) * 8;
    struct operand result = {0, 0, 0};
    const uint8_t *next = modrm + 1;
    int has_base = 1, base = rm + extend_base, is_relative = 0;
    if (rm == 4) {
        uint8_t sib = *next++;
        int index = ((sib >> 3) & 7) + extend_index;
        if (index != 4) result.stride = (uint64_t)registers[REGISTERS[index]] << (sib >> 6);
        base = (sib & 7) + extend_base;
        has_base = !((sib & 7) == 5 && mode == 0);
    } else if (rm == 5 && mode == 0) {
        has_base = 0;
        is_relative = 1;
    }
    if (has_base) result.address = (uint64_t)registers[REGISTERS[base]];
    if (mode == 1) {
        result.address += (int64_t)(int8_t)*next;
        next += 1;
    } else if (mode == 2 || !has_base) {
        int32_t displacement;
        memcpy(&displacement, next, 4);
        result.address += (int64_t)displacement;
        next += 4;
    }
    if (is_relative) result.address += (uint64_t)next;
    result.length = (int)(next - modrm - 1);
    return result;
}

static float as_float(uint16_t bits) {
    uint32_t wide = (bits & 0x7F80) ? (uint32_t)bits << 16 : (uint32_t)(bits & 0x8000) << 16; /* no denormals */
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static int multiply(struct state *s, int c, int a, int b) {
    if (s->rows[c] != s->rows[a] || s->bytes[a] != 4 * s->rows[b] || s->bytes[c] != s->bytes[b]) return 0;
    for (int m = 0; m < s->rows[c]; m++)
        for (int k = 0; k < s->bytes[a] / 4; k++)
            for (int n = 0; n < s->bytes[c] / 4; n++) {
                float total;
                uint16_t x[2], y[2];
                memcpy(&total, &s->data[c][m][4 * n], 4);
                memcpy(x, &s->data[a][m][4 * k], 4);
                memcpy(y, &s->data[b][k][4 * n], 4);
                total += as_float(x[0]) * as_float(y[0]);
                total += as_float(x[1]) * as_float(y[1]);
                memcpy(&s->data[c][m][4 * n], &total, 4);
            }
    __atomic_add_fetch(&products, 1, __ATOMIC_RELAXED);
    return 1;
}

static int configure(struct state *s, const uint8_t *source) {
    if (source[0] != 1) return 0;
    for (int i = 1; i < 16; i++)
        if (source[i]) return 0;
    for (int t = 0; t < TILES; t++) {
        memcpy(&s->bytes[t], source + 16 + 2 * t, 2);
        s->rows[t] = source[48 + t];
        if (s->bytes[t] > MAX_BYTES || s->rows[t] > MAX_ROWS) return 0;
    }
    for (int i = 32; i < 48; i++)
        if (source[i]) return 0;
    for (int i = 56; i < 64; i++)
        if (source[i]) return 0;
    memset(s->data, 0, sizeof s->data);
    s->configured = 1;
    return 1;
}

/* Returns the length of the instruction at `code`, or 0 if it is none of these instructions or must fault. */
static int emulate(const uint8_t *code, const greg_t *registers) {
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84)) return 0; /* map 0F38, W0, 128 bits */
    struct state *s = &own;
    int prefix = code[2] & 3; /* 0: none, 1: 66, 2: F3, 3: F2 */
    int opcode = code[3], in_register = code[4] >> 6 == 3, reg = (code[4] >> 3) & 7;
    int vvvv = ~(code[2] >> 3) & 15;
    if (opcode == 0x49 && prefix == 0 && code[4] == 0xC0) { /* TILERELEASE */
        s->configured = 0;
        return 5;
    }
    if (opcode == 0x49 && prefix == 0 && !in_register && reg == 0) { /* LDTILECFG */
        struct operand m = decode(code + 4, code, registers);
        return configure(s, (const uint8_t *)(m.address + m.stride)) ? 5 + m.length : 0;
    }
    if (!s->configured) return 0;
    if (opcode == 0x49 && prefix == 3 && in_register) { /* TILEZERO */
        memset(s->data[reg], 0, sizeof s->data[reg]);
        return 5;
    }
    if (opcode == 0x4B && (prefix == 3 || prefix == 2) && !in_register && (code[4] & 7) == 4) {
        struct operand m = decode(code + 4, code, registers);
        for (int row = 0; row < s->rows[reg]; row++) {
            uint8_t *memory = (uint8_t *)(m.address + (uint64_t)row * m.stride);
            if (prefix == 3) /* TILELOADD */
                memcpy(s->data[reg][row], memory, s->bytes[reg]);
            else /* TILESTORED */
                memcpy(memory, s->data[reg][row], s->bytes[reg]);
        }
        return 5 + m.length;
    }
    if (opcode == 0x5C && prefix == 2 && in_register) /* TDPBF16PS */
        return multiply(s, reg, code[4] & 7, vvvv) ? 5 : 0;
    return 0;
}

static void handle(int signal_number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    int length = emulate((const uint8_t *)registers[REG_RIP], registers);
    if (length)
        registers[REG_RIP] += length;
    else
        signal(signal_number, SIG_DFL); /* the instruction faults again, and ends the process */
}

int emulate_amx(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    return sigaction(SIGILL, &action, NULL);
}

/* Returns whether the tile registers of this thread are in use. */
int is_configured(void) { return own.configured; }

long count_products(void) { return __atomic_load_n(&products, __ATOMIC_RELAXED); }
