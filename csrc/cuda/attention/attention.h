/* What launchers of attention hand to its kernels. Shapes and meanings: fastlm/ops/attention.py; strides and lengths
are counts of elements. */
#pragma once

#include "../../rules/numeric.h"

namespace fastlm {

constexpr int LARGEST_D = 128;  // channels
constexpr int BOUNDED = 64;  // positions that have a least and a largest segment
constexpr int WARP_LANES = 32;
constexpr float LOG2E = 1.44269504088896341f;

struct Rows {  // [B, heads, L, D], channels side by side, every row at a multiple of 16 bytes
    const char* data;
    int64_t batch, head, row;
};

struct Attention {
    Rows q, k, v;
    int B, H, group, Lq, Lk, D;  // group: query heads to a key/value head
    int left, right, offset;
    float scale;
    // null where not given
    const float* table;  // [H, Lq + Lk - 1]
    const int64_t *key_lengths, *prefix;  // [B]
    const int64_t *q_segments, *k_segments;  // [B, L]
    int64_t *q_least, *q_largest, *k_least, *k_largest;  // [B, L / BOUNDED rounded up], of the segments
    char* out;  // [B, H, Lq, D] without gaps
    float* lse;  // [B, H, Lq]
};

struct AttentionBackward {
    Attention forward;
    Rows grad;  // like q
    const float* grad_lse;  // [B, H, Lq], or null
    // [B, H, Lq rounded up to BOUNDED], for the kernels after attention_delta: the log-sum-exp in log₂, +∞ for queries
    // that do not exist or see nothing; and δ
    float *lse, *delta;
    char *dq, *dk, *dv;  // [B, H or Hk, L, D] without gaps
    // null where the table's gradient is not wanted: [H, Lq + Lk - 1], and [H, splits, diagonals, 2 · BLOCK] for
    // partial sums of `diagonals` block diagonals from `first_diagonal` on
    float *dtable, *partial;
    int first_diagonal, diagonals, splits;
};

constexpr int BLOCK = 64;  // rows and columns of the tiles that block diagonals are made of

// How many pieces of `size` hold n.
FASTLM_RULE int pieces(int n, int size) { return (n + size - 1) / size; }

// Where the values of queries of head `place` = b · H + h begin in AttentionBackward's lse and delta.
FASTLM_RULE int64_t padded_row(const Attention& a, int64_t place) { return place * pieces(a.Lq, BOUNDED) * BOUNDED; }

}  // namespace fastlm
