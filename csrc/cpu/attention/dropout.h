// Dropout: csrc/rules/philox.h and fastlm/backends/philox.py, W counters at a time. Counter (j / 4, i, b · H + h, 0),
// word j mod 4.
#pragma once

#include "masks.h"

namespace fastlm {
namespace FASTLM_ISA {

struct Draws {
    Words word[4];
};

static FASTLM_INLINE void multiply(Words x, uint32_t m, Words& high, Words& low) {
    const Longs factor = (Longs{} + m), low_half = Longs{} + 0xffffffffu;
    const Longs even = multiply_low_halves((Longs)x, factor), odd = multiply_low_halves((Longs)x >> 32, factor);
    low = (Words)((even & low_half) | odd << 32);
    high = (Words)(even >> 32 | (odd & ~low_half));
}

static FASTLM_INLINE Draws philox(Draws c, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        Words high0, low0, high1, low1;
        multiply(c.word[0], 0xD2511F53u, high0, low0);
        multiply(c.word[2], 0xCD9E8D57u, high1, low1);
        c = {{high1 ^ c.word[1] ^ k0, low1, high0 ^ c.word[3] ^ k1, low0}};
    }
    return c;
}

// All bits of kept [keys, TILE] where the pair's word keeps it, none elsewhere.
static inline void draw_kept(const Attention& a, const Pairs& at, float* kept) {
    const uint64_t threshold = a.terms->threshold;
    const uint32_t last_dropped = uint32_t(threshold - 1);
    Words lanes;
    for (int l = 0; l < W; l++) lanes[l] = uint32_t(a.terms->first_query + at.i0) + l;
    const int64_t first = a.terms->first_key + at.j0;
    for (int64_t block = first / 4; block * 4 < first + at.keys; block++)
        for (int lane = 0; lane < TILE; lane += W) {
            const Words none = {};
            const Draws draws =
                philox({{none + uint32_t(block), lanes + uint32_t(lane), none + uint32_t(at.b * a.H + at.h), none}},
                    a.terms->seed);
            for (int e = 0; e < 4; e++) {
                const int64_t j = block * 4 + e - first;
                if (j >= 0 && j < at.keys) store(kept + j * TILE + lane, (V)(draws.word[e] > last_dropped));
            }
        }
}

static FASTLM_INLINE V both(V bits, V x) { return (V)((Words)bits & (Words)x); }

// p [keys, TILE] without what is dropped; pairs of bf16 keys share a word.
template <class Product>
static inline void drop(const Attention& a, const Pairs& at, const TermSpace& space, float* p) {
    if (!a.terms->threshold) return;
    for (int j = 0; j < at.keys; j += Product::PAIR)
        for (int lane = 0; lane < TILE; lane += W) {
            const float* kept = space.kept + j * TILE + lane;
            float* to = p + j / Product::PAIR * TILE + lane;
            Words mask = (Words)load(kept);
            if (Product::PAIR == 2)
                mask = (mask & 0xffffu) | (j + 1 < at.keys ? (Words)load(kept + TILE) & 0xffff0000u : Words{});
            store(to, both((V)mask, load(to)));
        }
}

// What p meets in backward, from its product ⟨grad, v⟩: with value_vectors, and zero or scaled up by dropout.
static FASTLM_INLINE V dropped_gradient(const Attention& a, const TermSpace& space, V product, int key, int lane) {
    if (a.terms->value_vectors) product += load(space.value + key * TILE + lane);
    return a.terms->threshold ? both(load(space.kept + key * TILE + lane), product * a.terms->kept_scale) : product;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
