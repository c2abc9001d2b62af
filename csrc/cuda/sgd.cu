// SGD over lists of tensors: 12 bytes an element in fp32, 20 with momentum.
#include "optimizer.cuh"

namespace fastlm {

template <Precision PRECISION>
struct ApplySgd {
    const Now<Sgd>* now;
    Flags flags;

    __device__ void operator()(const Chunk<REST<PRECISION> + 1>& chunk) const {
        constexpr int G = REST<PRECISION>;
        if (flags.skip()) return;
        const float factor = flags.factor();
        const Now<Sgd> c = now[chunk.tensor];
        map<WRITTEN<PRECISION, 0>, 2>(chunk, threadIdx.x, [&](float (&x)[G + 1][VECTOR], int i) {
            float theta[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                theta[e] = read<PRECISION>(x, e, chunk.dtype);
                sgd(theta[e], factor * x[G][e], c.rule);
            }
            write<PRECISION>(theta, x, chunk.dtype[1], chunk.begin + VECTOR * i, c.step, c.key);
        });
    }
};

template <Precision PRECISION>
struct ApplyMomentum {
    const Now<Sgd>* now;
    Flags flags;

    __device__ void operator()(const Chunk<REST<PRECISION> + 2>& chunk) const {
        constexpr int G = REST<PRECISION>, B = G + 1;
        if (flags.skip()) return;
        const float factor = flags.factor();
        const Now<Sgd> c = now[chunk.tensor];
        map<WRITTEN<PRECISION, 0b10>, 1>(chunk, threadIdx.x, [&](float (&x)[B + 1][VECTOR], int i) {
            float theta[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                theta[e] = read<PRECISION>(x, e, chunk.dtype);
                sgd(theta[e], factor * x[G][e], x[B][e], c.rule);
            }
            write<PRECISION>(theta, x, chunk.dtype[1], chunk.begin + VECTOR * i, c.step, c.key);
        });
    }
};

int64_t sgd_workspace(const Sizes& sizes) { return int64_t(sizes.size() * sizeof(Now<Sgd>)); }

void launch_sgd(const Update& update, const Sizes& sizes, const Tensors& buffers, const SgdOptions& options,
    Address workspace, int device, Address stream) {
    check_update(update, sizes, {});
    check_workspace(workspace, sizes);
    if (!buffers.empty()) check_list("buffers", buffers, sizes);
    if (sizes.empty()) return;
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto now = reinterpret_cast<Now<Sgd>*>(workspace);
    const Flags flags = flags_of(update);
    launch_advance(update, options, now, queue);
    if (buffers.empty()) launch_kept<ApplySgd>("sgd", update, {&update.grads}, sizes, queue, now, flags);
    else launch_kept<ApplyMomentum>("sgd", update, {&update.grads, &buffers}, sizes, queue, now, flags);
}

}  // namespace fastlm
