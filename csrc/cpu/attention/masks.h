// The tiles that all terms share (terms.h), and the masks beyond a band and key_lengths: prefix, segments,
// ranks.
#pragma once

#include "tile.h"

namespace fastlm {
namespace FASTLM_ISA {

struct TermSpace {              // a thread's tiles
    float* addend;              // [TILE keys, TILE queries]
    float* value;               // the same: ⟨grad, value_vectors⟩, in backward
    float* kept;                // the same: all bits where dropout keeps
    float* by_bucket;           // [2 TILE, TILE]: what a term meets at each bucket of distances
    float *k_columns, *k_rows;  // [D, TILE], [TILE, padded D]: what key_vectors meet
    float* met;                 // like addend, with a softcap: what vectors add under it
};

static inline TermSpace term_space(Space& space, const Attention& a) {
    const int D = a.D;
    TermSpace s = {};
    s.addend = space.take(TILE * TILE);
    s.value = space.take(TILE * TILE);
    s.kept = space.take(TILE * TILE);
    s.by_bucket = space.take(2 * TILE * TILE);
    s.k_columns = space.take(TILE * D);
    s.k_rows = space.take(TILE * pad_channels(D));
    if (a.softcap != 0.0f) s.met = space.take(TILE * TILE);
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

constexpr int DISTANCES = 2 * TILE - 1;  // that a tile's pairs are at, counted from key - query + TILE - 1 = 0

struct Buckets {           // of a tile's distances, where there are vectors by distance
    int64_t begin;         // the first
    int count;
    int64_t row;           // of the tile's first distance in the shared sums
    int first[DISTANCES];  // of each bucket: its first distance
    int place[DISTANCES];  // of each distance: its bucket's place in by_bucket
};

struct TermTile {
    Pairs at;
    TermSpace space;
    QueryTerms query;
    Buckets buckets;
};

// ---------------------------------------------------------------------------------------------------------------------
// Masks

struct Span64 {
    int64_t least, most;
};

static inline Span64 span_of(const int64_t* x, int n) {
    Span64 s = {x[0], x[0]};
    for (int i = 1; i < n; i++) {
        s.least = x[i] < s.least ? x[i] : s.least;
        s.most = x[i] > s.most ? x[i] : s.most;
    }
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

// Hide every pair where keeps(id of query, id of key) is false; returns whether any is true.
template <class Keeps>
static FASTLM_INLINE bool hide_unless(
    float* tile, const Pairs& at, const int64_t* q_ids, const int64_t* k_ids, const Keeps& keeps) {
    int64_t ids[TILE] = {};
    for (int i = 0; i < TILE; i++) ids[i] = q_ids[i < at.queries ? i : 0];
    int any = 0;
    for (int j = 0; j < at.keys; j++)
        for (int i = 0; i < TILE; i++) {
            const bool kept = keeps(ids[i], k_ids[j]);
            tile[j * TILE + i] = kept ? tile[j * TILE + i] : -__builtin_inff();
            any |= kept;
        }
    return any;
}

// -∞ over what no mask shows; false where one of them shows nothing.
static inline bool hide(const Attention& a, const Pairs& at, const Scores& scores, float* tile) {
    const Terms& terms = *a.terms;
    const int64_t q = at.b * a.Lq + at.i0, k = at.b * a.Lk + at.j0;
    for (int j = 0; j < at.keys && !scores.full; j++) {
        if (terms.prefix && at.j0 + j < terms.prefix[at.b]) continue;
        for (int lane = 0; lane < TILE; lane += W)
            store(tile + j * TILE + lane, scores.hide(load(tile + j * TILE + lane), j, lane));
    }
    const auto equal = [](int64_t i, int64_t j) FASTLM_LAMBDA { return i == j; };
    const auto ranked = [](int64_t i, int64_t j) FASTLM_LAMBDA { return j <= i; };
    if (terms.q_segments && !hide_unless(tile, at, terms.q_segments + q, terms.k_segments + k, equal)) return false;
    return !terms.q_ranks || hide_unless(tile, at, terms.q_ranks + q, terms.k_ranks + k, ranked);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
