/*
What the launcher of attention (attention_launch.cpp) hands to the kernels of each instruction set.

The table comes as strips, one a head, turned round: strip[i - j + Lk - 1] is the bias of key j for query i, with PAD
entries before and after, so that 64 queries and one key read one run of it, whatever their place.
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

struct Attention {
    Rows q, k, v;
    int dtype;
    int64_t B, H, Hk, Lq, Lk;
    int D;
    const float* strips;            // [H, strip_size], or null
    int64_t strip_size;             // PAD + Lq + Lk - 1 + PAD
    const int64_t* key_lengths;     // [B], or null
    int64_t left, right, offset;
    float scale;
    char* out;                      // [B, H, Lq, D] dense, in dtype
    float* lse;                     // [B, H, Lq], natural logarithm
};

/*
The backward's units share the sums dk and dv of a key head, and add to a tile of keys in turn: a unit waits until as many
others have finished the tile as come before it in the order of units. That order is fixed, so the bits are, whatever the
number of threads; and units are begun in that order, so the one waited for is always at work.
*/
struct AttentionBackward {
    Attention forward;
    Rows grad;                      // like q
    const float* grad_lse;          // [B, H, Lq], or null
    char *dq, *dk, *dv;             // dense, in dtype
    float *dk_sum, *dv_sum;         // [B, Hk, Lk, padded D]
    float* dstrips;                 // [B, H, strip_size] of zeros, or null
    int64_t* finished;              // [B, Hk, tiles of keys] of zeros: how many units have finished the tile
};

// How many query tiles a unit of work holds: keys and values are read once for all, and all stay in the second-level cache.
constexpr int query_tiles(int D) { return D <= 64 ? 4 : D <= 128 ? 2 : 1; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t pad_channels(int64_t D) { return ceil_div(D, 16) * 16; }
constexpr int64_t query_blocks(int64_t Lq, int D) { return ceil_div(Lq, TILE * query_tiles(D)); }

// Units of work, and fp32 elements of workspace that one thread needs.
constexpr int64_t units(const Attention& a) { return a.B * a.H * query_blocks(a.Lq, a.D); }
constexpr int64_t forward_space(int D) { return TILE * (query_tiles(D) * (2 * pad_channels(D) + 16) + 2 * pad_channels(D) + 2 * TILE + 16); }
constexpr int64_t backward_space(int D) { return TILE * (query_tiles(D) * (5 * pad_channels(D) + 16) + 5 * pad_channels(D) + 6 * TILE + 64); }

struct Range {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
};

// Keys that any of the queries begin … end - 1 sees.
static inline Range keys_seen(const Attention& a, int64_t b, const Range& queries) {
    const int64_t n = a.key_lengths && a.key_lengths[b] < a.Lk ? a.key_lengths[b] : a.Lk;
    const int64_t first = queries.begin + a.offset - a.left, last = queries.end - 1 + a.offset + a.right;
    return {first > 0 ? first : 0, last + 1 < n ? last + 1 : n};
}

}  // namespace fastlm
