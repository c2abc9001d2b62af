// The gradient of queries: the forward pass's walk, of blocks that own QUERIES queries, a warp 16. Lines of algorithms
// are those of FlashAttention-2 (Dao 2023).
#include "kernels.h"
#include "probabilities.cuh"

namespace fastlm {

template <int D>
struct DqShape {
    static constexpr int KEYS = 64, WARPS = 4, THREADS = WARPS * WARP_LANES, QUERIES = 16 * WARPS;
    static constexpr int BYTES = (2 * QUERIES + 4 * KEYS) * Tile<D>::ROW_BYTES;
};

template <typename T, int D>
__global__ void __launch_bounds__(DqShape<D>::THREADS) attention_dq(const __grid_constant__ AttentionBackward x) {
    using Shape = DqShape<D>;
    constexpr int QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, THREADS = Shape::THREADS;
    const Attention& a = x.forward;
    // which queries of which head, in the order of the forward pass
    const int tiles = pieces(a.Lq, QUERIES), place = int(blockIdx.x) / tiles;
    const int i0 = (tiles - 1 - int(blockIdx.x) % tiles) * QUERIES, row = 16 * warp();
    const Head head(a, place / a.H, place % a.H);
    const Matrix queries(a.q, head.b, head.h), grads(x.grad, head.b, head.h), keys(a.k, head.b, head.h / a.group),
        values(a.v, head.b, head.h / a.group);

    const Tile<D> q{shared_memory()}, grad = q.after(QUERIES);
    const auto key_tile = [&](int stage) { return grad.after(QUERIES + 2 * stage * KEYS); };
    const auto value_tile = [&](int stage) { return grad.after(QUERIES + (2 * stage + 1) * KEYS); };
    const auto copy_tile = [&](int tile, int stage) {
        copy_rows<KEYS, THREADS>(key_tile(stage), keys, tile * KEYS, head.keys, a.D);
        copy_rows<KEYS, THREADS>(value_tile(stage), values, tile * KEYS, head.keys, a.D);
    };

    Statistics of[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int64_t i = padded_row(a, place) + i0 + row + row_of(0, 2 * half);
        of[half] = {x.lse[i], x.delta[i]};
    }
    FragmentC dq[1][D / 8] = {};
    const auto walk = tiles_of_keys<QUERIES, KEYS>(a, head, i0);
    int tile = walk.next(walk.begin), stage = 0;
    copy_rows<QUERIES, THREADS>(q, queries, i0, a.Lq, a.D);
    copy_rows<QUERIES, THREADS>(grad, grads, i0, a.Lq, a.D);
    if (tile < walk.end) copy_tile(tile, stage);
    commit_copies();
    while (tile < walk.end) {
        // the tile has come, and everyone is done with the other half, into which the next one may come
        wait_for_copies<0>();
        __syncthreads();
        const int next = walk.next(tile + 1);
        if (next < walk.end) copy_tile(next, stage ^ 1);
        commit_copies();

        // P once more from S and L, dP from the output's gradient, dS = P ∘ (dP - δ) (algorithm 2, lines 10 to 14)
        const bool full = walk.full(tile);
        FragmentC s[1][KEYS / 8], dp[1][KEYS / 8] = {};
        start<false>(s, a, head.h, i0 + row, tile * KEYS, full && i0 + QUERIES <= a.Lq);
        multiply_rows<T>(s, [&](int, int k) { return load_a(q, row, k); }, key_tile(stage));
        if (!full) hide<false>(s, a, head, i0 + row, tile * KEYS);
        multiply_rows<T>(dp, [&](int, int k) { return load_a(grad, row, k); }, value_tile(stage));
        probabilities(s, dp, a.scale * LOG2E, of);
        // dQ += dS K (line 15)
        FragmentA ds[1][KEYS / 16];
        narrow<T>(dp, ds);
        multiply_columns<T>(dq, ds, key_tile(stage));
        tile = next;
        stage ^= 1;
    }
    wait_for_copies<0>();
    store_rows<T>(dq, {{a.scale, a.scale}}, x.dq + int64_t(place) * a.Lq * a.D * 2, i0 + row, a.Lq, a.D);
}

template <typename T, int D>
static void launch_dq(const AttentionBackward& x, cudaStream_t stream) {
    using Shape = DqShape<D>;
    constexpr int THREADS = Shape::THREADS, BYTES = Shape::BYTES;
    const Attention& a = x.forward;
    const unsigned blocks = grid(int64_t(pieces(a.Lq, Shape::QUERIES)) * a.B * a.H);
    const auto kernel = attention_dq<T, D>;
    allow_shared(kernel, BYTES);
    kernel<<<blocks, THREADS, BYTES, stream>>>(x);
    check(cudaGetLastError(), "launch attention_dq");
}

void dq(const AttentionBackward& x, int dtype, cudaStream_t stream) {
    for_numbers_and_channels(dtype, x.forward.D,
        [&](auto number, auto channels) { launch_dq<decltype(number), decltype(channels)::value>(x, stream); });
}

}  // namespace fastlm
