// The least and the largest segment of every BOUNDED positions, by which walks pass over tiles that share none.
#include "kernels.h"
#include "masks.cuh"

namespace fastlm {

static __device__ __forceinline__ void write_bounds(
    const int64_t* segments, int L, int64_t piece, int64_t* least, int64_t* largest) {
    const int pieces_of_row = pieces(L, BOUNDED), first = int(piece % pieces_of_row) * BOUNDED;
    const int64_t* row = segments + piece / pieces_of_row * L;
    int64_t low = row[min(first + lane(), L - 1)], high = low;
    for (int i = first + WARP_LANES + lane(); i < min(first + BOUNDED, L); i += WARP_LANES) {
        low = min(low, row[i]);
        high = max(high, row[i]);
    }
    for (int distance = WARP_LANES / 2; distance > 0; distance /= 2) {
        low = min(low, __shfl_xor_sync(EVERY_LANE, low, distance));
        high = max(high, __shfl_xor_sync(EVERY_LANE, high, distance));
    }
    if (lane() == 0) least[piece] = low, largest[piece] = high;
}

__global__ void __launch_bounds__(WARP_LANES) attention_segments(const __grid_constant__ Attention a) {
    const int64_t of_queries = int64_t(a.B) * pieces(a.Lq, BOUNDED), piece = blockIdx.x;
    if (piece < of_queries) write_bounds(a.q_segments, a.Lq, piece, a.q_least, a.q_largest);
    else write_bounds(a.k_segments, a.Lk, piece - of_queries, a.k_least, a.k_largest);
}

void segment_bounds(const Attention& a, cudaStream_t stream) {
    if (!a.q_segments) return;
    const unsigned blocks = grid(int64_t(a.B) * (pieces(a.Lq, BOUNDED) + pieces(a.Lk, BOUNDED)));
    attention_segments<<<blocks, WARP_LANES, 0, stream>>>(a);
    check(cudaGetLastError(), "launch attention_segments");
}

}  // namespace fastlm
