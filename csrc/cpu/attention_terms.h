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

struct QueryTerms {             // of a tile of queries: what query_vectors meet, and its gradient
    float *columns, *rows;      // [D, TILE], [TILE, padded D]
    float* gradient;            // [D, TILE], where q_position is not q
};

struct TermTile {
    Pairs at;
    TermSpace space;
    QueryTerms query;
};

static inline QueryTerms query_terms(const Attention& a, const Pairs& at, Space& space) {
    const int D = a.D, padded = int(pad_channels(D));
    QueryTerms t = {space.take(TILE * D), space.take(TILE * padded), space.take(TILE * D)};
    if (!a.terms->query_vectors) return t;
    const Rows& position = a.terms->q_position.data ? a.terms->q_position : a.q;
    for (int e = 0; e < TILE * padded; e++) t.rows[e] = 0.0f;
    for (int e = 0; e < TILE * D; e++) t.gradient[e] = 0.0f;
    widen_rows(t.rows, padded, row_at(position, at.b, at.h, at.i0), position.row, a.dtype, at.queries, D);
    transpose(t.columns, TILE, t.rows, padded, TILE, D);
    return t;
}

// What key_vectors meet.
static inline void load_key_terms(const Attention& a, const Pairs& at, const TermSpace& space) {
    if (!a.terms->key_vectors) return;
    const int D = a.D, padded = int(pad_channels(D));
    const Rows& position = a.terms->k_position.data ? a.terms->k_position : a.k;
    for (int e = 0; e < TILE * padded; e++) space.k_rows[e] = 0.0f;
    widen_rows(space.k_rows, padded, row_at(position, at.b, at.h / (a.H / a.Hk), at.j0), position.row, a.dtype, at.keys, D);
    transpose(space.k_columns, TILE, space.k_rows, padded, TILE, D);
}

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
// Dense bias, and a query's value where groups are equal

template <typename T>
static inline void read_bias(const Terms& terms, const Pairs& at, float* rows) {
    const char* from = terms.bias.data + at.b * terms.bias.batch + at.h * terms.bias.head + at.i0 * terms.bias.row + at.j0 * terms.bias_column;
    for (int i = 0; i < at.queries; i++, from += terms.bias.row)
        for (int j = 0; j < at.keys; j++) rows[i * TILE + j] = widen(*reinterpret_cast<const T*>(from + j * terms.bias_column));
}

static inline void add_bias(const Terms& terms, const Pairs& at, float* rows, float* turned, float* tile) {
    if (terms.bias_dtype == BF16) read_bias<bf16>(terms, at, rows);
    else if (terms.bias_dtype == F16) read_bias<f16>(terms, at, rows);
    else read_bias<float>(terms, at, rows);
    transpose(turned, TILE, rows, TILE, at.queries, at.keys);
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < at.queries; i++) tile[j * TILE + i] += turned[j * TILE + i];
}

static inline void add_bias_gradient(const AttentionBackward& x, const Pairs& at, const float* ds, int64_t pitch) {
    const Attention& a = x.forward;
    const int64_t rows = a.terms->bias_rows, columns = a.terms->bias_columns;
    float* sum = x.terms.bias + (at.b * a.H + at.h) * rows * columns;
    if (rows > 1 && columns > 1) return transpose(sum + at.i0 * columns + at.j0, columns, ds, pitch, at.keys, at.queries);
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < at.queries; i++) sum[columns > 1 ? at.j0 + j : at.i0 + i] += ds[j * pitch + i];
}

// use(key, query of the tile) for each pair of equal groups.
template <class Use>
static FASTLM_INLINE void for_equal_groups(const Attention& a, const Pairs& at, const Use& use) {
    const int64_t *q = a.terms->q_groups + at.b * a.Lq + at.i0, *k = a.terms->k_groups + at.b * a.Lk + at.j0;
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < at.queries; i++)
            if (q[i] == k[j]) use(j, i);
}

static inline void add_same(const Attention& a, const Pairs& at, float* tile) {
    const float* same = a.terms->same + (at.b * a.H + at.h) * a.Lq + at.i0;
    for_equal_groups(a, at, [&](int j, int i) FASTLM_LAMBDA { tile[j * TILE + i] += same[i]; });
}

static inline void add_same_gradient(const AttentionBackward& x, const Pairs& at, const float* ds, int64_t pitch) {
    float* sum = x.terms.same + (at.b * x.forward.H + at.h) * x.forward.Lq + at.i0;
    for_equal_groups(x.forward, at, [&](int j, int i) FASTLM_LAMBDA { sum[i] += ds[j * pitch + i]; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Distance vectors

static __attribute__((noinline)) void product(const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Fma>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { store(out + m * pitch + c * W, x); });
}

static __attribute__((noinline)) void add_product(const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Fma>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { add_to(out + m * pitch + c * W, x); });
}

// The tile's first row: the nearest-to-the-front key for the last query.
static FASTLM_INLINE int64_t first_row(const Attention& a, const Pairs& at) { return PAD + at.j0 - at.i0 - (TILE - 1) + a.Lq - 1; }

template <typename T>
static FASTLM_INLINE T* rows_of(const Attention& a, const Pairs& at, T* vectors, int64_t head) {
    return vectors + (head * vector_rows(a) + first_row(a, at)) * pad_channels(a.D);
}

// tile[key][query] += factor · ⟨row of their distance, the query's column⟩; or the key's column.
template <bool OF_KEY>
static inline void add_met(const Attention& a, const Pairs& at, const float* rows, const float* columns, float factor, float* by_distance, float* tile) {
    product({rows, pad_channels(a.D), 1}, {columns, TILE}, DISTANCES, LANES, a.D, by_distance, TILE);
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < TILE; i++) tile[j * TILE + i] += factor * by_distance[(j - i + TILE - 1) * TILE + (OF_KEY ? j : i)];
}

// The way back: by_distance[row][query or key] = the tile's element, and zero at distances that the lane does not have.
template <bool OF_KEY>
static inline void spread(const Pairs& at, const float* tile, int64_t pitch, float* by_distance) {
    for (int e = 0; e < 2 * TILE * TILE; e++) by_distance[e] = 0.0f;
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < at.queries; i++) by_distance[(j - i + TILE - 1) * TILE + (OF_KEY ? j : i)] = tile[j * pitch + i];
}

// o [D, TILE] += Σ p̂ · value_vectors.
static inline void add_values(const Attention& a, const TermTile& tile, const float* p, float* o) {
    spread<false>(tile.at, p, TILE, tile.space.by_distance);
    add_product({rows_of(a, tile.at, a.terms->value_vectors, tile.at.h), 1, pad_channels(a.D)}, {tile.space.by_distance, TILE}, a.D, LANES, DISTANCES, o, TILE);
}

// From dS [keys, pitch], and p̂ [keys, TILE] without its scale: what vectors, and what they meet, get.
static inline void add_vector_gradients(const AttentionBackward& x, const TermTile& tile, const float* ds, int64_t pitch, const float* p, const float* grad_rows,
                                        float* dq, float* dk) {
    const Attention& a = x.forward;
    const auto& [at, space, query] = tile;
    const Terms& terms = *a.terms;
    const int64_t padded = pad_channels(a.D), bh = at.b * a.H + at.h;
    const int across = int(padded) / W;
    float* by = space.by_distance;
    if (terms.query_vectors) {
        spread<false>(at, ds, pitch, by);
        add_product({rows_of(a, at, terms.query_vectors, at.h), 1, padded}, {by, TILE}, a.D, LANES, DISTANCES, terms.q_position.data ? query.gradient : dq, TILE);
        if (x.terms.query_vectors) add_product({by, TILE, 1}, {query.rows, padded}, DISTANCES, across, TILE, rows_of(a, at, x.terms.query_vectors, bh), padded);
    }
    if (terms.key_vectors) {
        spread<true>(at, ds, pitch, by);
        add_product({by, 1, TILE}, {rows_of(a, at, terms.key_vectors, at.h), padded}, at.keys, across, DISTANCES, dk, padded);
        if (x.terms.key_vectors) add_product({by, TILE, 1}, {space.k_rows, padded}, DISTANCES, across, TILE, rows_of(a, at, x.terms.key_vectors, bh), padded);
    }
    if (x.terms.value_vectors) {
        spread<false>(at, p, TILE, by);
        add_product({by, TILE, 1}, {grad_rows, padded}, DISTANCES, across, TILE, rows_of(a, at, x.terms.value_vectors, bh), padded);
    }
}

// ⟨grad, value_vectors⟩ at the tile's pairs, for dropped_gradient.
static inline void meet_values(const Attention& a, const TermTile& tile, const float* grad_columns) {
    for (int e = 0; e < TILE * TILE; e++) tile.space.value[e] = 0.0f;
    add_met<false>(a, tile.at, rows_of(a, tile.at, a.terms->value_vectors, tile.at.h), grad_columns, 1.0f, tile.space.by_distance, tile.space.value);
}

// ---------------------------------------------------------------------------------------------------------------------
// All together

// The scores of a tile, from those that table and band alone would give; false if no query sees a key.
static inline bool with_terms(const Attention& a, const TermTile& tile, Scores& scores) {
    const auto& [at, space, query] = tile;
    const Terms& terms = *a.terms;
    if (!may_see(a, at)) return false;
    for (int j = 0; j < at.keys; j++)
        for (int lane = 0; lane < TILE; lane += W) store(space.addend + j * TILE + lane, scores.bias(j, lane));
    if (terms.bias.data) add_bias(terms, at, space.by_distance, space.by_distance + TILE * TILE, space.addend);
    if (terms.same) add_same(a, at, space.addend);
    if (terms.query_vectors) add_met<false>(a, at, rows_of(a, at, terms.query_vectors, at.h), query.columns, a.scale, space.by_distance, space.addend);
    if (terms.key_vectors) add_met<true>(a, at, rows_of(a, at, terms.key_vectors, at.h), space.k_columns, a.scale, space.by_distance, space.addend);
    if (!hide(a, at, scores, space.addend)) return false;
    if (terms.threshold) draw_kept(a, at, space.kept);
    scores.strip = space.addend, scores.step = -TILE, scores.full = true;
    return true;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
