/* Every term and mask beyond a table, a band and key_lengths. For a tile of keys and a tile of queries they make one
tile of addends, -∞ where a key is hidden, which enters the scores where the table's diagonals would
(Scores::first_bias, step -TILE); the kernels' products stay what they are. Dropout is a tile of bits. This is the place
for another term: `add_…` on the way forward, and its gradient from the tile of dS beside it. */
#pragma once

#include "distances.h"
#include "dropout.h"

namespace fastlm {
namespace FASTLM_ISA {

// ---------------------------------------------------------------------------------------------------------------------
// Dense bias, and a query's value where groups are equal

template <typename T>
static inline void read_bias(const Terms& terms, const Pairs& at, int queries, int keys, float* rows) {
    const char* from = terms.bias.data + at.b * terms.bias.batch + at.h * terms.bias.head + at.i0 * terms.bias.row +
                       at.j0 * terms.bias_column;
    if (terms.bias_column == sizeof(T)) return widen_rows<T>(rows, TILE, from, terms.bias.row, queries, keys);
    for (int i = 0; i < queries; i++, from += terms.bias.row)
        for (int j = 0; j < keys; j++)
            rows[i * TILE + j] = widen(*reinterpret_cast<const T*>(from + j * terms.bias_column));
}

static inline void add_bias(const Terms& terms, const Pairs& at, float* rows, float* turned, float* tile) {
    const bool by_query = terms.bias.row != 0, by_key = terms.bias_column != 0;  // or one value for all of them
    const int queries = by_query ? at.queries : 1, keys = by_key ? at.keys : 1;
    if (terms.bias_dtype == BF16) read_bias<bf16>(terms, at, queries, keys, rows);
    else if (terms.bias_dtype == F16) read_bias<f16>(terms, at, queries, keys, rows);
    else read_bias<float>(terms, at, queries, keys, rows);
    for (int e = queries * TILE; by_query && e < TILE * TILE; e++) rows[e] = 0.0f;
    if (by_query) transpose(turned, TILE, rows, TILE, TILE, keys);
    for (int j = 0; j < at.keys; j++)
        for (int lane = 0; lane < TILE; lane += W)
            add_to(tile + j * TILE + lane,
                by_query ? load(turned + (by_key ? j * TILE : 0) + lane) : broadcast(rows[by_key ? j : 0]));
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
    float of_queries[TILE] = {};
    for (int lane = 0; to.bias_of_queries && lane < TILE; lane += W)
        for (int j = 0; j < at.keys; j++) add_to(of_queries + lane, load(ds + j * pitch + lane));
    for (int i = 0; to.bias_of_queries && i < at.queries; i++)
        to.bias_of_queries[bh * a.Lq + at.i0 + i] += of_queries[i];
    if (!to.bias_own.data && !to.bias_sum.data) return;
    float* rows = tile.space.by_bucket;
    transpose(rows, TILE, ds, pitch, at.keys, at.queries);
    const auto start = [&](const Rows& of, int64_t size) FASTLM_LAMBDA {
        return of.data + at.b * of.batch + at.h * of.head + at.i0 * of.row + at.j0 * size;
    };
    const int dtype = a.terms->bias_dtype;
    if (to.bias_own.data)
        return narrow_rows(
            start(to.bias_own, size_of(dtype)), to.bias_own.row, rows, TILE, dtype, at.queries, at.keys, 1.0f);
    for (int i = 0; i < at.queries; i++) {
        float* sum = reinterpret_cast<float*>(start(to.bias_sum, sizeof(float)) + i * to.bias_sum.row);
        for (int j = 0; j < at.keys; j++) sum[j] += rows[i * TILE + j];
    }
}

// use(key, query of the tile, whether their groups are equal) for each pair, and for lanes without a query.
template <class Use>
static FASTLM_INLINE void for_groups(const Attention& a, const Pairs& at, const Use& use) {
    const int64_t *q = a.terms->q_groups + at.b * a.Lq + at.i0, *k = a.terms->k_groups + at.b * a.Lk + at.j0;
    int64_t groups[TILE];
    for (int i = 0; i < TILE; i++) groups[i] = q[i < at.queries ? i : 0];
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < TILE; i++) use(j, i, groups[i] == k[j]);
}

static inline void add_same(const Attention& a, const Pairs& at, float* tile) {
    const float* from = a.terms->same + (at.b * a.H + at.h) * a.Lq + at.i0;
    float same[TILE] = {};
    for (int i = 0; i < at.queries; i++) same[i] = from[i];
    for_groups(a, at, [&](int j, int i, bool equal) FASTLM_LAMBDA { tile[j * TILE + i] += equal ? same[i] : 0.0f; });
}

static inline void add_same_gradient(const AttentionBackward& x, const Pairs& at, const float* ds, int64_t pitch) {
    float sum[TILE] = {};
    for_groups(
        x.forward, at, [&](int j, int i, bool equal) FASTLM_LAMBDA { sum[i] += equal ? ds[j * pitch + i] : 0.0f; });
    for (int i = 0; i < at.queries; i++) x.terms.same[(at.b * x.forward.H + at.h) * x.forward.Lq + at.i0 + i] += sum[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// All together

// The scores of a tile, from those that table and band alone would give; false if no query sees a key.
static inline bool with_terms(const Attention& a, TermTile& tile, Scores& scores) {
    const auto& [at, space, query, buckets] = tile;
    const Terms& terms = *a.terms;
    if (!may_see(a, at)) return false;
    for (int j = 0; j < at.keys; j++)
        for (int lane = 0; lane < TILE; lane += W) store(space.addend + j * TILE + lane, scores.bias(j, lane));
    if (terms.bias.data) add_bias(terms, at, space.by_bucket, space.by_bucket + TILE * TILE, space.addend);
    if (terms.same) add_same(a, at, space.addend);
    if (has_vectors(terms)) find_buckets(a, at, tile.buckets);
    float *met = space.addend, factor = a.scale;
    if (space.met && (terms.query_vectors || terms.key_vectors)) {
        met = space.met, factor = scores.within;
        for (int e = 0; e < TILE * TILE; e++) met[e] = 0.0f;
        scores.met = met;
        scores.met_step = -TILE;
    }
    if (terms.query_vectors) add_met<false>(a, tile, terms.query_vectors, query.columns, factor, met);
    if (terms.key_vectors) add_met<true>(a, tile, terms.key_vectors, space.k_columns, factor, met);
    if (!hide(a, at, scores, space.addend)) return false;
    if (terms.threshold) draw_kept(a, at, space.kept);
    scores.first_bias = space.addend;
    scores.step = -TILE;
    scores.full = true;
    return true;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
