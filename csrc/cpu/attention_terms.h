/*
Every term and mask beyond a table, a band and key_lengths. For a tile of keys and a tile of queries they make one tile of
addends, -∞ where a key is hidden, which enters the scores where the table's strip would (Scores::strip, step -TILE); the
kernels' products stay what they are. Dropout is a tile of bits. This is the place for another term: `add_…` on the way
forward, and its gradient from the tile of dS beside it.

Distance vectors meet a tile in 2 TILE - 1 rows: `by_distance` holds, for each of those rows, one lane a query (or a key).
Element (row, lane) belongs to the pair with key - query + TILE - 1 = row.
*/
#pragma once

#include "attention_tile.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int DISTANCES = 2 * TILE - 1;

// Their products are in fp32 whatever the dtype, and so is the whole call.
static FASTLM_INLINE bool has_vectors(const Terms& terms) { return terms.query_vectors || terms.key_vectors || terms.value_vectors; }

struct TermSpace {              // a thread's tiles
    float* addend;              // [TILE keys, TILE queries]
    float* value;               // the same: ⟨grad, value_vectors⟩, in backward
    float* kept;                // the same: all bits where dropout keeps
    float* by_distance;         // [2 TILE, TILE]
    float *k_columns, *k_rows;  // [D, TILE], [TILE, padded D]: what key_vectors meet
};

static inline TermSpace term_space(Space& space, int D) {
    TermSpace s = {};
    s.addend = space.take(TILE * TILE), s.value = space.take(TILE * TILE), s.kept = space.take(TILE * TILE), s.by_distance = space.take(2 * TILE * TILE);
    s.k_columns = space.take(TILE * D), s.k_rows = space.take(TILE * pad_channels(D));
    return s;
}

struct Pairs {  // a tile: keys j0 … j0 + keys - 1 for queries i0 … i0 + queries - 1
    int64_t b, h, i0, j0;
    int queries, keys;
};

struct TermTile {
    Pairs at;
    TermSpace space;
};

// ---------------------------------------------------------------------------------------------------------------------
// Masks

struct Span64 { int64_t least, most; };

static inline Span64 span_of(const int64_t* x, int n) {
    Span64 s = {x[0], x[0]};
    for (int i = 1; i < n; i++) s.least = x[i] < s.least ? x[i] : s.least, s.most = x[i] > s.most ? x[i] : s.most;
    return s;
}

// False where one look at the tile's ends shows that no query sees a key.
static inline bool may_see(const Attention& a, const Pairs& at) {
    const Terms& terms = *a.terms;
    const int64_t q = at.b * a.Lq + at.i0, k = at.b * a.Lk + at.j0;
    if (!terms.prefix || at.j0 >= terms.prefix[at.b]) {
        const Range band = band_of(a, {at.i0, at.i0 + at.queries});
        if (band.begin >= at.j0 + at.keys || band.end <= at.j0) return false;
    }
    if (terms.q_segments) {
        const Span64 queries = span_of(terms.q_segments + q, at.queries), keys = span_of(terms.k_segments + k, at.keys);
        if (queries.most < keys.least || keys.most < queries.least) return false;
    }
    return !terms.q_ranks || span_of(terms.k_ranks + k, at.keys).least <= span_of(terms.q_ranks + q, at.queries).most;
}

// Hide every pair where keeps(id of query, id of key) is false.
template <class Keeps>
static FASTLM_INLINE void hide_unless(float* tile, const Pairs& at, const int64_t* q_ids, const int64_t* k_ids, const Keeps& keeps) {
    int64_t ids[TILE] = {};
    for (int i = 0; i < at.queries; i++) ids[i] = q_ids[i];
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < TILE; i++) tile[j * TILE + i] = keeps(ids[i], k_ids[j]) ? tile[j * TILE + i] : -__builtin_inff();
}

// -∞ over what no mask shows; returns whether anything is left.
static inline bool hide(const Attention& a, const Pairs& at, const Scores& scores, float* tile) {
    const Terms& terms = *a.terms;
    const int64_t q = at.b * a.Lq + at.i0, k = at.b * a.Lk + at.j0;
    for (int j = 0; j < at.keys && !scores.full; j++) {
        if (terms.prefix && at.j0 + j < terms.prefix[at.b]) continue;
        for (int lane = 0; lane < TILE; lane += W) store(tile + j * TILE + lane, scores.hide(load(tile + j * TILE + lane), j, lane));
    }
    if (terms.q_segments) hide_unless(tile, at, terms.q_segments + q, terms.k_segments + k, [](int64_t i, int64_t j) FASTLM_LAMBDA { return i == j; });
    if (terms.q_ranks) hide_unless(tile, at, terms.q_ranks + q, terms.k_ranks + k, [](int64_t i, int64_t j) FASTLM_LAMBDA { return j <= i; });
    int seen = 0;
    for (int e = 0; e < at.keys * TILE; e++) seen |= tile[e] != -__builtin_inff();
    return seen;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout: csrc/rules/philox.h and fastlm/philox.py, W counters at a time. Counter (j / 4, i, b · H + h, 0), word j mod 4.

struct Draws { Words word[4]; };

static FASTLM_INLINE void multiply(Words x, uint32_t m, Words& high, Words& low) {
    const Longs factor = (Longs{} + m), low_half = Longs{} + 0xffffffffu;
    const Longs even = multiply_low_halves((Longs)x, factor), odd = multiply_low_halves((Longs)x >> 32, factor);
    low = (Words)((even & low_half) | odd << 32), high = (Words)(even >> 32 | (odd & ~low_half));
}

static FASTLM_INLINE Draws philox(Draws c, uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        Words high0, low0, high1, low1;
        multiply(c.word[0], 0xD2511F53u, high0, low0), multiply(c.word[2], 0xCD9E8D57u, high1, low1);
        c = {{high1 ^ c.word[1] ^ k0, low1, high0 ^ c.word[3] ^ k1, low0}};
    }
    return c;
}

// All bits of kept [keys, TILE] where the pair's word keeps it, none elsewhere.
static inline void draw_kept(const Attention& a, const Pairs& at, float* kept) {
    const uint64_t threshold = a.terms->threshold;
    const uint32_t last_dropped = uint32_t(threshold - 1);
    Words lanes;
    for (int l = 0; l < W; l++) lanes[l] = uint32_t(at.i0) + l;
    for (int64_t block = at.j0 / 4; block * 4 < at.j0 + at.keys; block++)
        for (int lane = 0; lane < TILE; lane += W) {
            const Words none = {};
            const Draws draws = philox({{none + uint32_t(block), lanes + uint32_t(lane), none + uint32_t(at.b * a.H + at.h), none}}, a.terms->seed);
            for (int e = 0; e < 4; e++) {
                const int64_t j = block * 4 + e - at.j0;
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
            if (Product::PAIR == 2) mask = (mask & 0xffffu) | (j + 1 < at.keys ? (Words)load(kept + TILE) & 0xffff0000u : Words{});
            store(to, both((V)mask, load(to)));
        }
}

// What p meets in backward, from its product ⟨grad, v⟩: with value_vectors, and zero or scaled up by dropout.
static FASTLM_INLINE V dropped_gradient(const Attention& a, const TermSpace& space, V product, int key, int lane) {
    if (a.terms->value_vectors) product += load(space.value + key * TILE + lane);
    return a.terms->threshold ? both(load(space.kept + key * TILE + lane), product * a.terms->kept_scale) : product;
}

// ---------------------------------------------------------------------------------------------------------------------
// All together

// The scores of a tile, from those that table and band alone would give; false if no query sees a key.
static inline bool with_terms(const Attention& a, const TermTile& tile, Scores& scores) {
    const auto& [at, space] = tile;
    if (!may_see(a, at)) return false;
    for (int j = 0; j < at.keys; j++)
        for (int lane = 0; lane < TILE; lane += W) store(space.addend + j * TILE + lane, scores.bias(j, lane));
    if (!hide(a, at, scores, space.addend)) return false;
    if (a.terms->threshold) draw_kept(a, at, space.kept);
    scores.strip = space.addend, scores.step = -TILE, scores.full = true;
    return true;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
