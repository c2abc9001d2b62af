/* AMX for processors that have none: the tile instructions of csrc/cpu/attention/amx.h in software, as Intel's Software
Developer's Manual (volume 2) describes them, and a processor and a system that say they have them. Included before
everything else:

    CXX="g++ -include tests/on_host/amx.h" python setup.py build

Stricter than a processor: whatever would fault there, or would read a register nobody has written, ends the program.
*/
#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_on_host {

struct Config {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

struct Register {
    bool written;
    float words[16][16];
};

static thread_local Config config;
static thread_local Register registers[8];

[[maybe_unused]] static void require(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
}

[[maybe_unused]] static void load_config(const void* p) {
    std::memcpy(&config, p, sizeof config);
    require(config.palette == 1 && config.first_row == 0, "a palette other than 1, or a row to begin at");
    for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes that are not 0");
    for (int i = 0; i < 16; i++)
        require(i < 8 ? config.rows[i] <= 16 && config.bytes[i] <= 64 && config.bytes[i] % 4 == 0
                      : !config.rows[i] && !config.bytes[i],
            "a shape no register has");
    for (Register& r : registers) r.written = false;
}

[[maybe_unused]] static void release() {
    config = {};
    for (Register& r : registers) r.written = false;
}

static Register& at(int i) {
    require(config.palette == 1 && i >= 0 && i < 8 && config.rows[i] > 0 && config.bytes[i] > 0,
        "a register used without a shape");
    return registers[i];
}

[[maybe_unused]] static void zero(int i) {
    at(i) = {};
    registers[i].written = true;
}

[[maybe_unused]] static void load(int i, const void* from, int64_t stride) {
    zero(i);
    for (int r = 0; r < config.rows[i]; r++)
        std::memcpy(registers[i].words[r], static_cast<const char*>(from) + r * stride, config.bytes[i]);
}

[[maybe_unused]] static void store(int i, void* to, int64_t stride) {
    require(at(i).written, "a register stored that nobody has written");
    for (int r = 0; r < config.rows[i]; r++)
        std::memcpy(static_cast<char*>(to) + r * stride, registers[i].words[r], config.bytes[i]);
}

// Half of a word as fp32; subnormal numbers count as zero.
static float half(float word, int which) {
    uint32_t bits;
    std::memcpy(&bits, &word, 4);
    bits = which ? bits & 0xffff0000u : bits << 16;
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    std::memcpy(&word, &bits, 4);
    return word;
}

static float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// c += a b: the even halves' products are summed by themselves, and the odd ones', each without rounding between
// product and sum.
[[maybe_unused]] static void multiply(int c, int a, int b) {
    require(at(a).written && at(b).written && at(c).written, "a register multiplied that nobody has written");
    require(c != a && c != b && a != b, "one register in two places of a product");
    require(
        config.rows[c] == config.rows[a] && config.bytes[c] == config.bytes[b] && config.bytes[a] / 4 == config.rows[b],
        "shapes that do not fit");
    for (int m = 0; m < config.rows[c]; m++)
        for (int n = 0; n < config.bytes[c] / 4; n++) {
            float sums[2] = {};
            for (int k = 0; k < config.rows[b]; k++)
                for (int h = 0; h < 2; h++)
                    sums[h] =
                        flush(std::fma(half(registers[a].words[m][k], h), half(registers[b].words[k][n], h), sums[h]));
            float& out = registers[c].words[m][n];
            out = flush(flush(out) + flush(sums[0] + sums[1]));
        }
}

static constexpr int LEAF_7_EDX = 1 << 22 | 1 << 24;  // AMX-BF16, AMX-TILE

[[maybe_unused]] static int cpuid(unsigned leaf, unsigned subleaf, unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
    const int known = __get_cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7) *d |= LEAF_7_EDX;
    return known;
}

}  // namespace amx_on_host

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_on_host::load_config
#define _tile_release amx_on_host::release
#define _tile_zero amx_on_host::zero
#define _tile_loadd amx_on_host::load
#define _tile_stored amx_on_host::store
#define _tile_dpbf16ps amx_on_host::multiply
#define __get_cpuid_count amx_on_host::cpuid
#define syscall(...) 0  // the system grants what is asked
