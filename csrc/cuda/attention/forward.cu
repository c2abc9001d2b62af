/*
Flash attention's forward pass on tensor cores: one pass over the keys with a running softmax (Dao et al. 2022; lines of
algorithms are those of FlashAttention-2, Dao 2023).

A block owns QUERIES queries of one head, a warp of it 16 M, and walks the tiles of KEYS keys that they see. While a
tile is computed, the next one is on its way into the other half of shared memory.
*/
#include "kernels.h"
#include "pairs.cuh"

namespace fastlm {

// running maximum before any key: finite, so that a row seeing nothing never meets -∞ - -∞
constexpr float NOTHING = -3.402823466e38f;

template <int D>
struct ForwardShape {
    // wider than this, a warp's sums need more registers than there are
    static constexpr int M = D == 64 ? 2 : 1, WARPS = D == 64 ? 4 : 8, KEYS = 64;
    static constexpr int THREADS = WARPS * WARP_LANES, QUERIES = 16 * M * WARPS;
    static constexpr int STAGES = 2, BYTES = (QUERIES + 2 * STAGES * KEYS) * Tile<D>::ROW_BYTES;
};

// ---------------------------------------------------------------------------------------------------------------------
// Device

// The largest, and the sum, of a number of the four lanes that share a row.
static __device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(EVERY_LANE, x, 1));
    return fmaxf(x, __shfl_xor_sync(EVERY_LANE, x, 2));
}
static __device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(EVERY_LANE, x, 1);
    return x + __shfl_xor_sync(EVERY_LANE, x, 2);
}

// Probabilities are relative to a maximum that may be behind the true one by so much in log₂: they then reach 2⁸, and
// nothing is rescaled until a row of the warp has left it further behind, as FlashAttention-4 does.
constexpr float BEHIND = 8.0f;

template <int M>
struct Softmax {  // of a lane's rows: a running maximum in log₂, and the lane's own part of Σ p relative to it
    float max[M][2], sum[M][2];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) max[m][half] = NOTHING, sum[m][half] = 0.0f;
    }

    // Scores → P; what was summed relative to an old maximum is rescaled (algorithm 1, line 9, and line 10's diag).
    template <int N, int CHANNELS>
    __device__ __forceinline__ void operator()(FragmentC (&s)[M][N], FragmentC (&o)[M][CHANNELS], float to_log2) {
        float now[M][2];
        bool far = false;
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float largest = s[m][0].x[2 * half];
#pragma unroll
                for (int n = 0; n < N; n++)
                    largest = fmaxf(fmaxf(largest, s[m][n].x[2 * half]), s[m][n].x[2 * half + 1]);
                now[m][half] = fmaxf(max[m][half], row_max(largest) * to_log2);
                far = far || now[m][half] - max[m][half] > BEHIND;
            }
        if (__any_sync(EVERY_LANE, far)) rescale(o, now);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[m][n].x[e] = exp2_approximate(fmaf(s[m][n].x[e], to_log2, -max[m][e / 2]));
                    sum[m][e / 2] += s[m][n].x[e];
                }
    }

    template <int CHANNELS>
    __device__ __forceinline__ void rescale(FragmentC (&o)[M][CHANNELS], const float (&now)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float factor = exp2_approximate(max[m][half] - now[m][half]);
                max[m][half] = now[m][half];
                sum[m][half] *= factor;
#pragma unroll
                for (int c = 0; c < CHANNELS; c++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) o[m][c].x[e] *= factor;
            }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernel

template <typename T, int D>
__global__ void __launch_bounds__(ForwardShape<D>::THREADS) attention_forward(const __grid_constant__ Attention a) {
    using Shape = ForwardShape<D>;
    constexpr int M = Shape::M, QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, THREADS = Shape::THREADS;
    // which queries of which head; under a causal mask the last ones have most to do, so they begin
    const int tiles = pieces(a.Lq, QUERIES), place = int(blockIdx.x) / tiles;
    const int i0 = (tiles - 1 - int(blockIdx.x) % tiles) * QUERIES, row = 16 * M * warp();
    const Head head(a, place / a.H, place % a.H);
    const Matrix queries(a.q, head.b, head.h), keys(a.k, head.b, head.h / a.group),
        values(a.v, head.b, head.h / a.group);

    const Tile<D> q{shared_memory()};
    const auto key_tile = [&](int stage) { return q.after(QUERIES + 2 * stage * KEYS); };
    const auto value_tile = [&](int stage) { return q.after(QUERIES + (2 * stage + 1) * KEYS); };
    const auto copy_tile = [&](int tile, int stage) {
        copy_rows<KEYS, THREADS>(key_tile(stage), keys, tile * KEYS, head.keys, a.D);
        copy_rows<KEYS, THREADS>(value_tile(stage), values, tile * KEYS, head.keys, a.D);
    };

    // nothing summed yet (algorithm 1, lines 4 and 5)
    FragmentC o[M][D / 8] = {};
    Softmax<M> softmax;
    const auto walk = tiles_of_keys<QUERIES, KEYS>(a, head, i0);
    int tile = walk.next(walk.begin), stage = 0;
    copy_rows<QUERIES, THREADS>(q, queries, i0, a.Lq, a.D);
    if (tile < walk.end) copy_tile(tile, stage);
    commit_copies();
    while (tile < walk.end) {
        // the tile has come, and everyone is done with the other half, into which the next one may come
        wait_for_copies<0>();
        __syncthreads();
        const int next = walk.next(tile + 1);
        if (next < walk.end) copy_tile(next, stage ^ 1);
        commit_copies();

        // S of the tile (line 8), P and the row sums (line 9), P V (line 10)
        const bool full = walk.full(tile);
        FragmentC s[M][KEYS / 8];
        start<false>(s, a, head.h, i0 + row, tile * KEYS, full && i0 + QUERIES <= a.Lq);
        multiply_rows<T>(s, [&](int m, int k) { return load_a(q, row + 16 * m, k); }, key_tile(stage));
        if (!full) hide<false>(s, a, head, i0 + row, tile * KEYS);
        softmax(s, o, a.scale * LOG2E);
        FragmentA p[M][KEYS / 16];
        narrow<T>(s, p);
        multiply_columns<T>(o, p, value_tile(stage));
        tile = next;
        stage ^= 1;
    }
    wait_for_copies<0>();

    // O = acc / l and L = m + ln l (lines 12 and 13); rows that saw nothing are zeros, and L = -∞
    const int64_t first = int64_t(place) * a.Lq;
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = row_sum(softmax.sum[m][half]);
            const int i = i0 + row + row_of(m, 2 * half);
            factor[m][half] = sum == 0.0f ? 0.0f : 1.0f / sum;
            if (lane() % 4 == 0 && i < a.Lq)
                a.lse[first + i] = sum == 0.0f ? -INFINITE : softmax.max[m][half] / LOG2E + logf(sum);
        }
    store_rows<T>(o, factor, a.out + first * a.D * 2, i0 + row, a.Lq, a.D);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

template <typename T, int D>
static void launch_forward(const Attention& a, cudaStream_t stream) {
    using Shape = ForwardShape<D>;
    constexpr int THREADS = Shape::THREADS, BYTES = Shape::BYTES;
    const unsigned blocks = grid(int64_t(pieces(a.Lq, Shape::QUERIES)) * a.B * a.H);
    const auto kernel = attention_forward<T, D>;
    allow_shared(kernel, BYTES);
    kernel<<<blocks, THREADS, BYTES, stream>>>(a);
    check(cudaGetLastError(), "launch attention");
}

void forward(const Attention& a, int dtype, cudaStream_t stream) {
    for_numbers_and_channels(dtype, a.D,
        [&](auto number, auto channels) { launch_forward<decltype(number), decltype(channels)::value>(a, stream); });
}

}  // namespace fastlm
