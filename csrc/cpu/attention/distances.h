/*
Terms by distance: query_vectors, key_vectors, value_vectors, and the gradients of both sides of each product.

Distance vectors meet a tile in 2 TILE - 1 rows: `by_distance` holds, for each of those rows, one lane a query (or a
key). Element (row, lane) belongs to the pair with key - query + TILE - 1 = row. Units that run at the same time share
no row (turns.h).
*/
#pragma once

#include "masks.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int DISTANCES = 2 * TILE - 1;

// Their products are in fp32 whatever the dtype, and with value_vectors so is the whole call.
static FASTLM_INLINE bool has_vectors(const Terms& terms) {
    return terms.query_vectors || terms.key_vectors || terms.value_vectors;
}

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
    widen_rows(
        space.k_rows, padded, row_at(position, at.b, at.h / (a.H / a.Hk), at.j0), position.row, a.dtype, at.keys, D);
    transpose(space.k_columns, TILE, space.k_rows, padded, TILE, D);
}

static __attribute__((noinline)) void product(
    const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Fma>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { store(out + m * pitch + c * W, x); });
}

static __attribute__((noinline)) void add_product(
    const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Fma>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { add_to(out + m * pitch + c * W, x); });
}

// The tile's first row: the nearest-to-the-front key for the last query.
static FASTLM_INLINE int64_t first_row(const Attention& a, const Pairs& at) {
    return PAD + at.j0 - at.i0 - (TILE - 1) + a.Lq - 1;
}

template <typename T>
static FASTLM_INLINE T* rows_of(const Attention& a, const Pairs& at, T* vectors, int64_t head) {
    return vectors + (head * vector_rows(a) + first_row(a, at)) * pad_channels(a.D);
}

// tile[key][query] += factor · ⟨row of their distance, the query's column⟩; or the key's column.
template <bool OF_KEY>
static inline void add_met(const Attention& a, const Pairs& at, const float* rows, const float* columns, float factor,
    float* by_distance, float* tile) {
    product({rows, pad_channels(a.D), 1}, {columns, TILE}, DISTANCES, LANES, a.D, by_distance, TILE);
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < TILE; i++)
            tile[j * TILE + i] += factor * by_distance[(j - i + TILE - 1) * TILE + (OF_KEY ? j : i)];
}

// The way back: by_distance[row][query or key] = the tile's element, and zero at distances that the lane does not have.
template <bool OF_KEY>
static inline void spread(const Pairs& at, const float* tile, int64_t pitch, float* by_distance) {
    for (int e = 0; e < 2 * TILE * TILE; e++) by_distance[e] = 0.0f;
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < at.queries; i++)
            by_distance[(j - i + TILE - 1) * TILE + (OF_KEY ? j : i)] = tile[j * pitch + i];
}

// o [D, TILE] += Σ p̂ · value_vectors.
static inline void add_values(const Attention& a, const TermTile& tile, const float* p, float* o) {
    spread<false>(tile.at, p, TILE, tile.space.by_distance);
    add_product({rows_of(a, tile.at, a.terms->value_vectors, tile.at.h), 1, pad_channels(a.D)},
        {tile.space.by_distance, TILE}, a.D, LANES, DISTANCES, o, TILE);
}

// From dS [keys, pitch], and p̂ [keys, TILE] without its scale: what vectors, and what they meet, get.
static inline void add_vector_gradients(const AttentionBackward& x, const TermTile& tile, const float* ds,
    int64_t pitch, const float* p, const float* grad_rows, float* dq, float* dk) {
    const Attention& a = x.forward;
    const auto& [at, space, query] = tile;
    const Terms& terms = *a.terms;
    const int64_t padded = pad_channels(a.D);
    const int across = int(padded) / W;
    float* by = space.by_distance;
    if (terms.query_vectors) {
        spread<false>(at, ds, pitch, by);
        add_product({rows_of(a, at, terms.query_vectors, at.h), 1, padded}, {by, TILE}, a.D, LANES, DISTANCES,
            terms.q_position.data ? query.gradient : dq, TILE);
        if (x.terms.query_vectors)
            add_product({by, TILE, 1}, {query.rows, padded}, DISTANCES, across, TILE,
                rows_of(a, at, x.terms.query_vectors, at.h), padded);
    }
    if (terms.key_vectors) {
        spread<true>(at, ds, pitch, by);
        add_product(
            {by, 1, TILE}, {rows_of(a, at, terms.key_vectors, at.h), padded}, at.keys, across, DISTANCES, dk, padded);
        if (x.terms.key_vectors)
            add_product({by, TILE, 1}, {space.k_rows, padded}, DISTANCES, across, TILE,
                rows_of(a, at, x.terms.key_vectors, at.h), padded);
    }
    if (x.terms.value_vectors) {
        spread<false>(at, p, TILE, by);
        add_product({by, TILE, 1}, {grad_rows, padded}, DISTANCES, across, TILE,
            rows_of(a, at, x.terms.value_vectors, at.h), padded);
    }
}

// ⟨grad, value_vectors⟩ at the tile's pairs, for dropped_gradient.
static inline void meet_values(const Attention& a, const TermTile& tile, const float* grad_columns) {
    for (int e = 0; e < TILE * TILE; e++) tile.space.value[e] = 0.0f;
    add_met<false>(a, tile.at, rows_of(a, tile.at, a.terms->value_vectors, tile.at.h), grad_columns, 1.0f,
        tile.space.by_distance, tile.space.value);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
