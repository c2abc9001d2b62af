/* What attention hides, and which tiles nobody need visit: kernels/masks.py in CUDA. */
#pragma once

#include "tile.cuh"

namespace fastlm {

constexpr unsigned EVERY_LANE = 0xffffffffu;

struct Head {  // a query head of a row of the batch, how many keys that row has, and how many of them all queries see
    int b, h, keys, prefix;

    __device__ Head(const Attention& a, int b, int h) : b(b), h(h), keys(a.Lk), prefix(0) {
        if (a.key_lengths) keys = int(min(max(a.key_lengths[b], int64_t(0)), int64_t(a.Lk)));
        if (a.prefix) prefix = int(min(max(a.prefix[b], int64_t(0)), int64_t(keys)));
    }
};

struct Segments {  // of BOUNDED positions each, the least and the largest
    const int64_t *least, *largest;

    // Whether tile `tile` of SIZE positions may hold one of low … high, and whether it holds nothing but `one`.
    template <int SIZE>
    __device__ bool meet(int tile, int64_t low, int64_t high) const {
        return __ldg(least + tile * SIZE / BOUNDED) <= high && __ldg(largest + tile * SIZE / BOUNDED) >= low;
    }
    template <int SIZE>
    __device__ bool are(int tile, int64_t one) const {
        return __ldg(least + tile * SIZE / BOUNDED) == one && __ldg(largest + tile * SIZE / BOUNDED) == one;
    }
};

// The tiles of SIZE positions that a block of threads visits: from `begin` to `end`; between full_begin and full_end
// all pairs are visible, as far as the band, the prefix and lengths go.
template <int SIZE>
struct Walk {
    int begin, full_begin, full_end, end;
    Segments segments;  // null where there are none
    int64_t low, high;  // the block's own

    // What positions first … last see of n, when x sees x - below … x + above.
    __device__ Walk(int first, int last, int below, int above, int n) : segments{nullptr, nullptr}, low(0), high(0) {
        begin = max(first - below, 0) / SIZE;
        end = max(pieces(max(min(last + above + 1, n), 0), SIZE), begin);
        full_begin = min(max(pieces(max(last - below, 0), SIZE), begin), end);
        full_end = max(min(max(min(first + above + 1, n), 0) / SIZE, end), full_begin);
    }

    // To tiles that hold a segment of the block's: `count` of `own` from `first` on, where there are so many of `n`.
    __device__ void narrow(const Segments& own, int first, int count, int n, const Segments& others) {
        segments = others;
        low = __ldg(own.least + first);
        high = __ldg(own.largest + first);
        for (int i = first + 1; i < min(first + count, n); i++) {
            low = min(low, __ldg(own.least + i));
            high = max(high, __ldg(own.largest + i));
        }
    }

    // The first tile from `tile` on that must be visited, or `end`: a lane looks at each of 32.
    __device__ int next(int tile) const {
        if (!segments.least) return tile;
        for (; tile < end; tile += WARP_LANES) {
            const int mine = tile + lane();
            const bool meets = mine < end && segments.meet<SIZE>(mine, low, high);
            const unsigned found = __ballot_sync(EVERY_LANE, meets);
            if (found) return tile + __ffs(int(found)) - 1;
        }
        return end;
    }

    __device__ bool full(int tile) const {
        if (tile < full_begin || tile >= full_end) return false;
        return !segments.least || (low == high && segments.are<SIZE>(tile, low));
    }
};

static __device__ Segments query_segments(const Attention& a, int b) {
    const int64_t row = int64_t(b) * pieces(a.Lq, BOUNDED);
    return {a.q_least + row, a.q_largest + row};
}
static __device__ Segments key_segments(const Attention& a, int b) {
    const int64_t row = int64_t(b) * pieces(a.Lk, BOUNDED);
    return {a.k_least + row, a.k_largest + row};
}

// Tiles of keys that queries i0 … i0 + QUERIES - 1 see.
template <int QUERIES, int SIZE>
static __device__ Walk<SIZE> tiles_of_keys(const Attention& a, const Head& head, int i0) {
    const int last = min(i0 + QUERIES, a.Lq) - 1;
    Walk<SIZE> walk(i0 + a.offset, last + a.offset, a.left, a.right, head.keys);
    if (head.prefix > 0) {
        // with a gap between prefix and band, tiles in it are visited for nothing
        const bool joined = walk.full_begin <= head.prefix / SIZE;
        walk.begin = 0;
        walk.full_begin = joined ? 0 : walk.full_begin;
        walk.full_end = joined ? max(walk.full_end, head.prefix / SIZE) : walk.full_end;
        walk.end = max(walk.end, pieces(head.prefix, SIZE));
    }
    if (a.q_segments)
        walk.narrow(
            query_segments(a, head.b), i0 / BOUNDED, QUERIES / BOUNDED, pieces(a.Lq, BOUNDED), key_segments(a, head.b));
    return walk;
}

// Tiles of queries that see keys j0 … j0 + KEYS - 1; none sees keys that do not exist.
template <int KEYS, int SIZE>
static __device__ Walk<SIZE> tiles_of_queries(const Attention& a, const Head& head, int j0) {
    const int last = min(j0 + KEYS, head.keys) - 1, n = j0 < head.keys ? a.Lq : 0;
    Walk<SIZE> walk(j0 - a.offset, last - a.offset, a.right, a.left, n);
    if (j0 < head.prefix) {
        walk.begin = 0;
        walk.end = pieces(n, SIZE);
        walk.full_begin = last < head.prefix ? 0 : walk.full_begin;
        walk.full_end = last < head.prefix ? n / SIZE : walk.full_end;
    }
    if (a.q_segments)
        walk.narrow(
            key_segments(a, head.b), j0 / BOUNDED, KEYS / BOUNDED, pieces(a.Lk, BOUNDED), query_segments(a, head.b));
    return walk;
}

}  // namespace fastlm
