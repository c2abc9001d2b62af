// What the gradients' walks need of each query: δ = ⟨grad, out⟩, less the gradient of L itself (FlashAttention-2, Dao
// 2023, algorithm 2, line 4), and L in log₂.
#include "kernels.h"
#include "pairs.cuh"

namespace fastlm {

constexpr int DELTA_THREADS = 128, ROW_LANES = LARGEST_D / 8, ROWS = DELTA_THREADS / ROW_LANES;

struct alignas(16) Eight {
    uint32_t pairs[4];
};

template <typename T>
__global__ void __launch_bounds__(DELTA_THREADS) attention_delta(const __grid_constant__ AttentionBackward x) {
    const Attention& a = x.forward;
    const int rows = pieces(a.Lq, BOUNDED) * BOUNDED, c = int(threadIdx.x) % ROW_LANES * 8;
    const int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.x / ROW_LANES, place = row / rows;
    const int i = int(row % rows);
    float sum = 0.0f;
    if (i < a.Lq && c < a.D) {
        const Matrix grads(x.grad, int(place / a.H), int(place % a.H));
        const Eight grad = *reinterpret_cast<const Eight*>(grads.data + (i * grads.row + c) * 2);
        const Eight out = *reinterpret_cast<const Eight*>(a.out + ((place * a.Lq + i) * a.D + c) * 2);
#pragma unroll
        for (int pair = 0; pair < 4; pair++)
#pragma unroll
            for (int high = 0; high < 2; high++)
                sum = fmaf(widen(T{uint16_t(grad.pairs[pair] >> 16 * high)}),
                    widen(T{uint16_t(out.pairs[pair] >> 16 * high)}), sum);
    }
    for (int distance = ROW_LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, distance);
    if (c > 0) return;
    float lse = INFINITE;
    if (i < a.Lq) {
        if (x.grad_lse) sum -= x.grad_lse[place * a.Lq + i];
        if (a.lse[place * a.Lq + i] != -INFINITE) lse = a.lse[place * a.Lq + i] * LOG2E;
    }
    x.lse[row] = lse;
    x.delta[row] = sum;
}

void delta(const AttentionBackward& x, int dtype, cudaStream_t stream) {
    const Attention& a = x.forward;
    const unsigned blocks = grid(padded_row(a, int64_t(a.B) * a.H) / ROWS);
    if (dtype == F16) attention_delta<f16><<<blocks, DELTA_THREADS, 0, stream>>>(x);
    else attention_delta<bf16><<<blocks, DELTA_THREADS, 0, stream>>>(x);
    check(cudaGetLastError(), "launch attention_delta");
}

}  // namespace fastlm
