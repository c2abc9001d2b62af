/*
Every term and mask beyond a table, a band and key_lengths. For a tile of keys and a tile of queries they make one tile of
addends, -∞ where a key is hidden, which enters the scores where the table's strip would (Scores::strip, step -TILE); the
kernels' products stay what they are. Dropout is a tile of bits. This is the place for another term: `add_…` on the way
forward, and its gradient from the tile of dS beside it.
*/
#pragma once

#include "attention_distances.h"
#include "attention_dropout.h"

namespace fastlm {
namespace FASTLM_ISA {

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

static inline void add_bias_gradient(const AttentionBackward& x, const TermTile& tile, const float* ds, int64_t pitch) {
    const Attention& a = x.forward;
    const TermGradients& to = x.terms;
    const Pairs& at = tile.at;
    const int64_t bh = at.b * a.H + at.h;
    for (int j = 0; to.bias_of_keys && j < at.keys; j++) {
        V sum = {};
        for (int lane = 0; lane < TILE; lane += W) sum += load(ds + j * pitch + lane);
        for (int l = 0; l < W; l++) to.bias_of_keys[bh * a.Lk + at.j0 + j] += sum[l];
    }
    for (int i = 0; to.bias_of_queries && i < at.queries; i++)
        for (int j = 0; j < at.keys; j++) to.bias_of_queries[bh * a.Lq + at.i0 + i] += ds[j * pitch + i];
    if (!to.bias_own.data && !to.bias_sum.data) return;
    float* rows = tile.space.by_distance;
    transpose(rows, TILE, ds, pitch, at.keys, at.queries);
    const auto start = [&](const Rows& of, int64_t size) FASTLM_LAMBDA { return of.data + at.b * of.batch + at.h * of.head + at.i0 * of.row + at.j0 * size; };
    if (to.bias_own.data) return narrow_rows(start(to.bias_own, size_of(a.terms->bias_dtype)), to.bias_own.row, rows, TILE, a.terms->bias_dtype, at.queries, at.keys, 1.0f);
    for (int i = 0; i < at.queries; i++) {
        float* sum = reinterpret_cast<float*>(start(to.bias_sum, sizeof(float)) + i * to.bias_sum.row);
        for (int j = 0; j < at.keys; j++) sum[j] += rows[i * TILE + j];
    }
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
