/*
Terms by distance: query_vectors, key_vectors, value_vectors, and the gradients of both sides of each product.

A tile's pairs are at 2 TILE - 1 distances, which have vectors of as many buckets, or fewer: far ones share one.
Products are made once a bucket: `by_bucket` holds, for each, one lane a query (or a key). Distances are counted from
the tile's first, key - query + TILE - 1.

In the shared sums of gradients a tile adds to rows of its own distances alone, so that units that run at the same time
share none (turns.h): what a bucket gets goes to the first of its distances there, and the launcher adds these up.
*/
#pragma once

#include "masks.h"

namespace fastlm {
namespace FASTLM_ISA {

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

static __attribute__((noinline)) void add_product(
    const Left& a, const Right& b, int M, int vectors, int K, float* out, int64_t pitch) {
    matmul<Fma>(a, b, M, vectors, K, [&](int m, int c, V x) FASTLM_LAMBDA { add_to(out + m * pitch + c * W, x); });
}

static inline void find_buckets(const Attention& a, const Pairs& at, Buckets& found) {
    found.row = PAD + at.j0 - at.i0 - (TILE - 1) + a.Lq - 1;  // the nearest-to-the-front key for the last query
    const int32_t* bucket = a.terms->bucket + found.row;
    found.begin = bucket[0];
    found.count = 0;
    for (int d = 0; d < DISTANCES; d++) {
        if (bucket[d] - found.begin == found.count) found.first[found.count++] = d;
        found.place[d] = int(bucket[d] - found.begin) * TILE;
    }
    if (found.row < PAD) found.first[0] = int(PAD - found.row);  // no pair is at those before it
}

static FASTLM_INLINE const float* vectors_of(const Attention& a, const TermTile& tile, const float* vectors) {
    return vectors + (tile.at.h * a.terms->buckets + tile.buckets.begin) * pad_channels(a.D);
}

// sum[row of the bucket's first distance] += Σ over lanes of the bucket's products · right, [TILE, padded D].
static inline void add_to_sums(const Attention& a, const TermTile& tile, const float* right, float* sums) {
    const int64_t padded = pad_channels(a.D);
    float* to = sums + (tile.at.h * vector_rows(a) + tile.buckets.row) * padded;
    matmul<Fma>({tile.space.by_bucket, TILE, 1}, {right, padded}, tile.buckets.count, int(padded) / W, TILE,
        [&](int m, int c, V x) FASTLM_LAMBDA { add_to(to + tile.buckets.first[m] * padded + c * W, x); });
}

// use(key, query, place in by_bucket) for the tile's keys and so many queries; keys in the inner loop if KEYS_LAST.
template <bool OF_KEY, bool KEYS_LAST, class Use>
static FASTLM_INLINE void for_pairs(const TermTile& tile, int queries, const Use& use) {
    const int* place = tile.buckets.place + TILE - 1;
    const int outer = KEYS_LAST ? queries : tile.at.keys, inner = KEYS_LAST ? tile.at.keys : queries;
    const bool own = tile.buckets.count == DISTANCES;  // each distance has a bucket, whose place needs no reading
    for (int x = 0; x < outer; x++)
        for (int y = 0; own && y < inner; y++) {
            const int j = KEYS_LAST ? y : x, i = KEYS_LAST ? x : y;
            use(j, i, (j - i + TILE - 1) * TILE + (OF_KEY ? j : i));
        }
    for (int x = 0; x < outer; x++)
        for (int y = 0; !own && y < inner; y++) {
            const int j = KEYS_LAST ? y : x, i = KEYS_LAST ? x : y;
            use(j, i, place[j - i] + (OF_KEY ? j : i));
        }
}

// to[key][query] += factor · ⟨vector of their bucket, the query's column⟩; or the key's column.
template <bool OF_KEY>
static inline void add_met(
    const Attention& a, const TermTile& tile, const float* vectors, const float* columns, float factor, float* to) {
    float* by = tile.space.by_bucket;
    product<Fma>({vectors_of(a, tile, vectors), pad_channels(a.D), 1}, {columns, TILE}, tile.buckets.count, LANES, a.D,
        by, TILE);
    if (tile.buckets.count > 1)
        return for_pairs<OF_KEY, false>(
            tile, TILE, [&](int j, int i, int place) FASTLM_LAMBDA { to[j * TILE + i] += factor * by[place]; });
    for (int j = 0; j < tile.at.keys; j++)
        for (int lane = 0; lane < TILE; lane += W)
            add_to(to + j * TILE + lane, factor * (OF_KEY ? broadcast(by[j]) : load(by + lane)));
}

// The way back: by_bucket[bucket][query or key] = Σ of from over the lane's pairs in the bucket. The inner loop runs
// along the lanes, which add to elements of their own.
template <bool OF_KEY>
static inline void gather(const TermTile& tile, const float* from, int64_t pitch) {
    float* by = tile.space.by_bucket;
    for (int e = 0; e < tile.buckets.count * TILE; e++) by[e] = 0.0f;
    if (OF_KEY || tile.buckets.count > 1)
        return for_pairs<OF_KEY, OF_KEY>(
            tile, tile.at.queries, [&](int j, int i, int place) FASTLM_LAMBDA { by[place] += from[j * pitch + i]; });
    for (int lane = 0; lane < TILE; lane += W) {
        V sum = {};
        for (int j = 0; j < tile.at.keys; j++) sum += load(from + j * pitch + lane);
        store(by + lane, sum);
    }
}

// o [D, TILE] += Σ p̂ · value_vectors.
static inline void add_values(const Attention& a, const TermTile& tile, const float* p, float* o) {
    gather<false>(tile, p, TILE);
    add_product({vectors_of(a, tile, a.terms->value_vectors), 1, pad_channels(a.D)}, {tile.space.by_bucket, TILE}, a.D,
        LANES, tile.buckets.count, o, TILE);
}

// From dX [keys, pitch], which is dS without a softcap, and p̂ [keys, TILE] without its scale: what vectors, and what
// they meet, get.
static inline void add_vector_gradients(const AttentionBackward& x, const TermTile& tile, const float* dx,
    int64_t pitch, const float* p, const float* grad_rows, float* dq, float* dk) {
    const Attention& a = x.forward;
    const Terms& terms = *a.terms;
    const int64_t padded = pad_channels(a.D);
    const int count = tile.buckets.count;
    const float* by = tile.space.by_bucket;
    if (terms.query_vectors) {
        gather<false>(tile, dx, pitch);
        add_product({vectors_of(a, tile, terms.query_vectors), 1, padded}, {by, TILE}, a.D, LANES, count,
            terms.q_position.data ? tile.query.gradient : dq, TILE);
        if (x.terms.query_vectors) add_to_sums(a, tile, tile.query.rows, x.terms.query_vectors);
    }
    if (terms.key_vectors) {
        gather<true>(tile, dx, pitch);
        add_product({by, 1, TILE}, {vectors_of(a, tile, terms.key_vectors), padded}, tile.at.keys, int(padded) / W,
            count, dk, padded);
        if (x.terms.key_vectors) add_to_sums(a, tile, tile.space.k_rows, x.terms.key_vectors);
    }
    if (x.terms.value_vectors) {
        gather<false>(tile, p, TILE);
        add_to_sums(a, tile, grad_rows, x.terms.value_vectors);
    }
}

// ⟨grad, value_vectors⟩ at the tile's pairs, for dropped_gradient.
static inline void meet_values(const Attention& a, const TermTile& tile, const float* grad_columns) {
    for (int e = 0; e < TILE * TILE; e++) tile.space.value[e] = 0.0f;
    add_met<false>(a, tile, a.terms->value_vectors, grad_columns, 1.0f, tile.space.value);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
