/*
What the launcher of attention (launch.cpp) hands to the kernels of each instruction set.

The table comes as diagonals of each head, turned round: diagonals[i - j + Lk - 1] is the bias of key j for query i,
with PAD entries before and after, so that 64 queries and one key read one run of it, whatever their place.
*/
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int TILE = 64;        // queries of a tile, which are its vectors' lanes, and keys of a tile, its rows
constexpr int PAD = 2 * TILE;
constexpr int MAX_D = 256;

struct Rows {  // a matrix [L, D] for each batch row and head; strides in bytes, channels adjacent
    char* data;
    int64_t batch, head, row;
};

// What a call may have besides; see fastlm/ops/attention.py. Pointers are null where it is not given.
struct Terms {
    const int64_t* prefix;                                           // [B]
    const int64_t *q_segments, *q_ranks, *q_groups;                  // [B, Lq]
    const int64_t *k_segments, *k_ranks, *k_groups;                  // [B, Lk]
    const float* same;                                               // [B, H, Lq]
    Rows bias;  // [B, H, Lq, Lk], stride 0 where it is broadcast
    int64_t bias_column;  // bytes from a key to the next
    int bias_dtype;
    // like q and k, which take their place where not given
    Rows q_position, k_position;
    const float *query_vectors, *key_vectors, *value_vectors;  // [H, buckets, padded D]
    // [vector_rows]: which of these each distance has; in PAD places at both ends the first, or the last
    const int32_t* bucket;
    int64_t buckets;
    uint64_t threshold, seed;  // of dropout: a word below the threshold drops
    int64_t first_query, first_key;  // where it counts from
    float kept_scale;  // 1 / (1 - dropout)
};

struct Attention {
    Rows q, k, v;
    int dtype;
    int64_t B, H, Hk, Lq, Lk;
    int D;
    const float* diagonals;  // [H, diagonals_size], or null
    int64_t diagonals_size;  // PAD + Lq + Lk - 1 + PAD
    const int64_t* key_lengths;  // [B], or null
    int64_t left, right, offset;
    float scale;
    float softcap;  // x of the scaled products becomes softcap · tanh(x / softcap); 0 for none
    char* out;  // [B, H, Lq, D] dense, in dtype
    float* lse;  // [B, H, Lq], natural logarithm
    const Terms* terms;  // or null
};

struct TermGradients {  // null where not wanted
    // a bias with an element for each pair: its gradient, zeros, in the bias's dtype
    Rows bias_own;
    // one for all rows of the batch, or heads: fp32 sums, zeros, stride 0 where shared
    Rows bias_sum;
    // one for all keys, or queries: [B, H, Lq], [B, H, Lk] of zeros, summed to its shape later
    float *bias_of_queries, *bias_of_keys;
    float* same;  // [B, H, Lq] of zeros
    // [H, vector_rows, padded D] of zeros: for each distance a part of what its bucket gets
    float *query_vectors, *key_vectors, *value_vectors;
    char *q_position, *k_position;  // dense, in dtype
    float* k_position_sum;  // [B, Hk, Lk, padded D]
};

struct AttentionBackward {
    Attention forward;
    Rows grad;  // like q
    const float* grad_lse;  // [B, H, Lq], or null
    char *dq, *dk, *dv;  // dense, in dtype
    float *dk_sum, *dv_sum;  // [B, Hk, Lk, padded D]
    float* ddiagonals;  // [B, H, diagonals_size] of zeros, or null
    // [B, Hk, tiles of keys] of zeros: how many units have finished the tile (turns.h)
    int64_t* finished;
    // [units] of zeros: tiles of keys before this one are done; null where no term's sums are shared
    int64_t* progress;
    TermGradients terms;
};

// How many query tiles a unit of work holds: keys and values are read once for all, and all stay in the second-level
// cache.
constexpr int query_tiles(int D) { return D <= 64 ? 4 : D <= 128 ? 2 : 1; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t pad_channels(int64_t D) { return ceil_div(D, 16) * 16; }
constexpr int64_t vector_rows(const Attention& a) { return a.Lq + a.Lk - 1 + 2 * PAD; }
constexpr int64_t query_blocks(int64_t Lq, int D) { return ceil_div(Lq, TILE * query_tiles(D)); }

// Units of work, and fp32 elements of workspace that one thread needs: exactly, so that AddressSanitizer sees a step
// beyond.
constexpr int64_t units(const Attention& a) { return a.B * a.H * query_blocks(a.Lq, a.D); }
constexpr int64_t forward_space(int D) {
    return TILE * (query_tiles(D) * (2 * pad_channels(D) + 2) + 2 * pad_channels(D) + 2 * TILE);
}
constexpr int64_t backward_space(const Attention& a) {
    return TILE * (query_tiles(a.D) * (5 * pad_channels(a.D) + 2) + 4 * pad_channels(a.D)) + 5 * TILE * TILE / 2 +
           (TILE + 1) * (TILE + 16) + (a.softcap != 0.0f ? TILE * (TILE + 16) : 0);
}

// … and what its terms need on top: tiles of pairs, and what distance vectors meet.
constexpr int64_t terms_space(const Attention& a) {
    const int tiles = a.softcap != 0.0f ? 6 : 5;
    return a.terms ? TILE * (tiles * TILE + (query_tiles(a.D) * 3 + 2) * pad_channels(a.D)) : 0;
}

struct Range {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
};

// Keys in the band of any of the queries begin … end - 1.
static inline Range band_of(const Attention& a, const Range& queries) {
    return {queries.begin + a.offset - a.left, queries.end + a.offset + a.right};
}

// Keys from the first to the last that any of the queries sees.
static inline Range keys_seen(const Attention& a, int64_t b, const Range& queries) {
    const int64_t n = a.key_lengths && a.key_lengths[b] < a.Lk ? a.key_lengths[b] : a.Lk;
    const int64_t prefix = a.terms && a.terms->prefix ? a.terms->prefix[b] : 0;
    Range seen = band_of(a, queries);
    if (prefix > 0) seen = {0, seen.end > prefix ? seen.end : prefix};
    return {seen.begin > 0 ? seen.begin : 0, seen.end < n ? seen.end : n};
}

}  // namespace fastlm
