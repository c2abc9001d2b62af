/* LAMB over lists of tensors: a pass that updates the moments and sums θ² and r² over each chunk, a small kernel that
turns the sums into each tensor's ratio, and a pass that moves θ, with the direction computed again. Sums are fp64 and
added in order: the ratio is deterministic. */
#include "optimizer.cuh"
#include "squares.h"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

struct Squares {
    double p, r;
};  // of one chunk

template <Precision PRECISION>
struct LambMoments {
    const Now<Adam>* now;
    Squares* sums;
    Flags flags;

    __device__ void operator()(const Chunk<REST<PRECISION> + 3>& chunk) const {
        constexpr int G = REST<PRECISION>, M = G + 1, V = G + 2;
        if (flags.skip()) return;
        const float factor = flags.factor();
        const Adam c = now[chunk.tensor].rule;
        double p_sum = 0.0, r_sum = 0.0;
        map<0b110 << G, 1>(chunk, threadIdx.x, [&](float (&x)[V + 1][VECTOR], int) {
            float theta[VECTOR], r[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                theta[e] = read<PRECISION>(x, e, chunk.dtype);
                adam_moments(theta[e], factor * x[G][e], x[M][e], x[V][e], c);
                // as the second pass will find them
                x[M][e] = stored(x[M][e], chunk.dtype[M]);
                x[V][e] = stored(x[V][e], chunk.dtype[V]);
                r[e] = c.r_scale * adam_direction(x[M][e], x[V][e], c) + c.r_decay * theta[e];
            }
            p_sum += sum_of_squares(theta);
            r_sum += sum_of_squares(r);
        });
        // what the chunk adds to ‖θ‖² and ‖r‖²
        p_sum = block_sum<THREADS>(p_sum);
        __syncthreads();  // the sums of warps share their place
        r_sum = block_sum<THREADS>(r_sum);
        if (threadIdx.x == 0) sums[chunk.index] = {p_sum, r_sum};
    }
};

struct Ranges {  // the chunks of tensor t are first[t] … first[t + 1] - 1
    static constexpr int CAPACITY = (ARGUMENT_BYTES - 2 * OTHER_ARGUMENT_BYTES - 8) / 16;
    int64_t first[CAPACITY + 1], size[CAPACITY];
};

__global__ void __launch_bounds__(THREADS) lamb_ratio(const __grid_constant__ Ranges ranges, const Squares* sums,
    const RatioOptions options, const Flags flags, Now<Adam>* now) {
    if (flags.skip()) return;
    const int t = blockIdx.x;
    Squares mine = {0.0, 0.0};
    for (int64_t i = ranges.first[t] + threadIdx.x; i < ranges.first[t + 1]; i += THREADS) {
        mine.p += sums[i].p;
        mine.r += sums[i].r;
    }
    mine.p = block_sum<THREADS>(mine.p);
    __syncthreads();
    mine.r = block_sum<THREADS>(mine.r);
    if (threadIdx.x == 0) now[t].rule = with_ratio(now[t].rule, mine.p, mine.r, double(ranges.size[t]), options);
}

template <Precision PRECISION>
struct LambApply {
    const Now<Adam>* now;
    Flags flags;

    __device__ void operator()(const Chunk<REST<PRECISION> + 2>& chunk) const {
        constexpr int M = REST<PRECISION>, V = M + 1;
        if (flags.skip()) return;
        const Now<Adam> c = now[chunk.tensor];
        map<WRITTEN<PRECISION, 0>, 1>(chunk, threadIdx.x, [&](float (&x)[V + 1][VECTOR], int i) {
            float theta[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++)
                theta[e] = adam_apply(read<PRECISION>(x, e, chunk.dtype), x[M][e], x[V][e], c.rule);
            write<PRECISION>(theta, x, chunk.dtype[1], chunk.begin + VECTOR * i, c.step, c.key);
        });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

int64_t lamb_workspace(const Sizes& sizes) {
    return chunks_of(sizes) * int64_t(sizeof(Squares)) + int64_t(sizes.size() * sizeof(Now<Adam>));
}

void launch_lamb(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, const RatioOptions& ratio, Address workspace, int device, Address stream) {
    check_update(update, sizes, {{"exp_avgs", &m}, {"exp_avg_sqs", &v}});
    check_workspace(workspace, sizes);
    if (sizes.empty()) return;
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto sums = reinterpret_cast<Squares*>(workspace);
    const auto now = reinterpret_cast<Now<Adam>*>(sums + chunks_of(sizes));
    const Flags flags = flags_of(update);
    launch_advance(update, options, now, queue);
    // first pass: m and v, and Σ θ², Σ r² of every chunk
    launch_kept<LambMoments>("lamb", update, {&update.grads, &m, &v}, sizes, queue, now, sums, flags);
    // each tensor's ratio φ(‖θ‖)/‖r‖, from the sums of its chunks
    Ranges ranges;
    int64_t first = 0;
    for (size_t begin = 0; begin < sizes.size(); begin += Ranges::CAPACITY) {
        const int tensors = int(std::min<size_t>(Ranges::CAPACITY, sizes.size() - begin));
        ranges.first[0] = first;
        for (int t = 0; t < tensors; t++) {
            ranges.size[t] = sizes[begin + t];
            ranges.first[t + 1] = first += chunks_of(sizes[begin + t]);
        }
        lamb_ratio<<<tensors, THREADS, 0, queue>>>(ranges, sums, ratio, flags, now + begin);
        check(cudaGetLastError(), "launch lamb");
    }
    // second pass: θ, from m and v
    launch_kept<LambApply>("lamb", update, {&m, &v}, sizes, queue, now, flags);
}

}  // namespace fastlm
