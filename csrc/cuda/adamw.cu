// AdamW and Adam over lists of tensors: 28 bytes an element in fp32, so memory is the limit and arithmetic is not.
#include "optimizer.cuh"

namespace fastlm {

template <Precision PRECISION>
struct ApplyAdamW {
    const Now<Adam>* now;  // one for each tensor
    Flags flags;

    __device__ void operator()(const Chunk<REST<PRECISION> + 3>& chunk) const {
        constexpr int G = REST<PRECISION>, M = G + 1, V = G + 2;
        if (flags.skip()) return;
        const float factor = flags.factor();
        const Now<Adam> c = now[chunk.tensor];
        map<WRITTEN<PRECISION, 0b110>, 1>(chunk, threadIdx.x, [&](float (&x)[V + 1][VECTOR], int i) {
            float theta[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                theta[e] = read<PRECISION>(x, e, chunk.dtype);
                adam(theta[e], factor * x[G][e], x[M][e], x[V][e], c.rule);
            }
            write<PRECISION>(theta, x, chunk.dtype[1], chunk.begin + VECTOR * i, c.step, c.key);
        });
    }
};

int64_t adamw_workspace(const Sizes& sizes) { return int64_t(sizes.size() * sizeof(Now<Adam>)); }

void launch_adamw(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, Address workspace, int device, Address stream) {
    check_update(update, sizes, {{"exp_avgs", &m}, {"exp_avg_sqs", &v}});
    check_workspace(workspace, sizes);
    if (sizes.empty()) return;
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto now = reinterpret_cast<Now<Adam>*>(workspace);
    const Flags flags = flags_of(update);
    launch_advance(update, options, now, queue);
    using Bf16 = Known<packed(BF16, BF16, BF16, BF16)>;
    using Own = Known<packed(F32, F32, F32, F32), packed(BF16, BF16, BF16, BF16)>;
    using Master = Known<packed(BF16, F32, BF16, F32, F32)>;  // and gradients as the model makes them
    launch_kept<ApplyAdamW, Own, Bf16, Master>("adamw", update, {&update.grads, &m, &v}, sizes, queue, now, flags);
}

}  // namespace fastlm
