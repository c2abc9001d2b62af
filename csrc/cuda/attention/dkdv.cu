/*
The gradients of keys and values. A block owns KEYS keys of a key/value head, a warp 16 of them, and walks the tiles of
QUERIES queries that see them, of every query head that shares the keys; everything is held keys × queries. With the
queries come their gradients, L and δ. Lines of algorithms are those of FlashAttention-2 (Dao 2023).
*/
#include "kernels.h"
#include "probabilities.cuh"

namespace fastlm {

template <int D>
struct DkdvShape {
    static constexpr int QUERIES = D == 64 ? 64 : 32, WARPS = 4, THREADS = WARPS * WARP_LANES, KEYS = 16 * WARPS;
    static constexpr int NUMBERS = 2 * QUERIES * int(sizeof(float));  // bytes of L and δ
    static constexpr int BYTES = (2 * KEYS + 4 * QUERIES) * Tile<D>::ROW_BYTES + 2 * NUMBERS;
};

template <typename T, int D>
__global__ void __launch_bounds__(DkdvShape<D>::THREADS) attention_dkdv(const __grid_constant__ AttentionBackward x) {
    using Shape = DkdvShape<D>;
    constexpr int QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, THREADS = Shape::THREADS;
    const Attention& a = x.forward;
    // which keys of which key/value head; under a causal mask the first ones have most to do, so they begin
    const int tiles = pieces(a.Lk, KEYS), key_heads = a.H / a.group, place = int(blockIdx.x) / tiles;
    const int j0 = int(blockIdx.x) % tiles * KEYS, row = 16 * warp(), key_head = place % key_heads;
    const Head first(a, place / key_heads, key_head * a.group);

    const Tile<D> k{shared_memory()}, v = k.after(KEYS);
    const auto query_tile = [&](int stage) { return v.after(KEYS + 2 * stage * QUERIES); };
    const auto grad_tile = [&](int stage) { return v.after(KEYS + (2 * stage + 1) * QUERIES); };
    const auto numbers = [&](int stage) { return v.after(KEYS + 4 * QUERIES).at + stage * Shape::NUMBERS; };
    const auto copy_tile = [&](int h, int tile, int stage) {
        copy_rows<QUERIES, THREADS>(query_tile(stage), Matrix(a.q, first.b, h), tile * QUERIES, a.Lq, a.D);
        copy_rows<QUERIES, THREADS>(grad_tile(stage), Matrix(x.grad, first.b, h), tile * QUERIES, a.Lq, a.D);
        const int which = int(threadIdx.x) / QUERIES;  // L, δ, or neither
        const float* from = (which ? x.delta : x.lse) + padded_row(a, first.b * a.H + h) + tile * QUERIES;
        if (which < 2) copy_async(numbers(stage) + threadIdx.x * 4, from + threadIdx.x % QUERIES);
    };

    FragmentC dk[1][D / 8] = {}, dv[1][D / 8] = {};
    const auto walk = tiles_of_queries<KEYS, QUERIES>(a, first, j0);
    const int last_head = first.h + a.group - 1, begin = walk.next(walk.begin);
    int h = first.h, tile = begin, stage = 0;
    copy_rows<KEYS, THREADS>(k, Matrix(a.k, first.b, key_head), j0, first.keys, a.D);
    copy_rows<KEYS, THREADS>(v, Matrix(a.v, first.b, key_head), j0, first.keys, a.D);
    if (tile < walk.end) copy_tile(h, tile, stage);
    commit_copies();
    while (tile < walk.end) {
        // the tile has come, and everyone is done with the other half, into which the next one may come
        wait_for_copies<0>();
        __syncthreads();
        int next = walk.next(tile + 1), next_head = h;
        if (next >= walk.end && h < last_head) next = begin, next_head++;
        if (next < walk.end) copy_tile(next_head, next, stage ^ 1);
        commit_copies();

        // Pᵀ once more from S and L, dPᵀ from the output's gradient, dSᵀ = Pᵀ ∘ (dPᵀ - δ) (algorithm 2, lines 10 to 14)
        const bool full = walk.full(tile);
        FragmentC s[1][QUERIES / 8], dp[1][QUERIES / 8] = {};
        start<true>(s, a, h, j0 + row, tile * QUERIES, full && j0 + KEYS <= a.Lk);
        multiply_rows<T>(s, [&](int, int c) { return load_a(k, row, c); }, query_tile(stage));
        if (!full) hide<true>(s, a, first, j0 + row, tile * QUERIES);
        multiply_rows<T>(dp, [&](int, int c) { return load_a(v, row, c); }, grad_tile(stage));
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++) {
            const Shared at = numbers(stage) + column_of(n, 0) * 4;
            const Two lse = load_two(at), delta = load_two(at + QUERIES * 4);
            probability(
                s[0][n], dp[0][n], a.scale * LOG2E, [&](int e) { return Statistics{lse.x[e % 2], delta.x[e % 2]}; });
        }
        // dV += Pᵀ dO (line 12), dK += dSᵀ Q (line 16)
        FragmentA p[1][QUERIES / 16], ds[1][QUERIES / 16];
        narrow<T>(s, p);
        multiply_columns<T>(dv, p, grad_tile(stage));
        narrow<T>(dp, ds);
        multiply_columns<T>(dk, ds, query_tile(stage));
        tile = next;
        h = next_head;
        stage ^= 1;
    }
    wait_for_copies<0>();

    // keys that a row of the batch does not have were never masked: no other row saw them
    float there[1][2], scaled[1][2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        there[0][half] = j0 + row + row_of(0, 2 * half) < first.keys ? 1.0f : 0.0f;
        scaled[0][half] = a.scale * there[0][half];
    }
    const int64_t at = int64_t(place) * a.Lk * a.D * 2;
    store_rows<T>(dk, scaled, x.dk + at, j0 + row, a.Lk, a.D);
    store_rows<T>(dv, there, x.dv + at, j0 + row, a.Lk, a.D);
}

template <typename T, int D>
static void launch_dkdv(const AttentionBackward& x, cudaStream_t stream) {
    using Shape = DkdvShape<D>;
    constexpr int THREADS = Shape::THREADS, BYTES = Shape::BYTES;
    const Attention& a = x.forward;
    const unsigned blocks = grid(int64_t(pieces(a.Lk, Shape::KEYS)) * a.B * (a.H / a.group));
    const auto kernel = attention_dkdv<T, D>;
    allow_shared(kernel, BYTES);
    kernel<<<blocks, THREADS, BYTES, stream>>>(x);
    check(cudaGetLastError(), "launch attention_dkdv");
}

void dkdv(const AttentionBackward& x, int dtype, cudaStream_t stream) {
    for_numbers_and_channels(dtype, x.forward.D,
        [&](auto number, auto channels) { launch_dkdv<decltype(number), decltype(channels)::value>(x, stream); });
}

}  // namespace fastlm
