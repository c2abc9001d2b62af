// Reading gradients, unscaling and the rotary embedding; see launch.h.
#include <atomic>
#include <cmath>

#include "optim/lists.h"
#include "parallel.h"

namespace fastlm {

void launch_grad_stats(
    const Tensors& g, const Sizes& sizes, Address scale, double max_norm, Address stats, int threads) {
    check_list("grads", g, sizes);
    check(stats != 0, "stats is null");
    const std::vector<Chunk> chunks = cut(sizes);
    std::vector<double> partial(chunks.size());
    const Kernels& k = active();
    parallel_for(int64_t(chunks.size()), team(sizes, threads),
        [&](int64_t i) { partial[i] = k.sum_of_squares(span(g, chunks[i]), chunks[i].n); });
    double sum = 0.0;
    for (double x : partial) sum += x;
    const double unscale = 1.0 / scalar(scale, 1.0f);
    const float norm = float(std::sqrt(sum) * unscale);
    float* out = reinterpret_cast<float*>(stats);
    out[0] = norm;
    out[1] = float(unscale * (max_norm > 0 ? std::min(1.0, max_norm / (double(norm) + 1e-6)) : 1.0));
    out[2] = std::isfinite(norm) ? 0.0f : 1.0f;
}

void launch_unscale(const Tensors& g, const Sizes& sizes, Address factor, Address found_inf, int threads) {
    check_list("grads", g, sizes);
    check(factor && found_inf, "factor and found_inf must be given");
    const std::vector<Chunk> chunks = cut(sizes);
    const float f = scalar(factor, 1.0f);
    std::atomic<bool> bad{false};
    const Kernels& k = active();
    parallel_for(int64_t(chunks.size()), team(sizes, threads), [&](int64_t i) {
        if (k.unscale(span(g, chunks[i]), chunks[i].n, f)) bad.store(true, std::memory_order_relaxed);
    });
    if (bad) *reinterpret_cast<float*>(found_inf) = 1.0f;
}

void launch_rotate(Address x, Address out, int dtype, const std::vector<int64_t>& shape,
    const std::vector<int64_t>& x_strides, const std::vector<int64_t>& out_strides, Address cos, Address sin,
    int64_t angle_stride, int R, bool interleaved, int threads) {
    check(shape.size() == 4 && x_strides.size() == 4 && out_strides.size() == 4, "x must have four dimensions");
    const int64_t B = shape[0], H = shape[1], L = shape[2], D = shape[3];
    if (B * H * L * D == 0) return;
    check(x && out && cos && sin, "an address is null");
    check(x_strides[3] == 1 && out_strides[3] == 1, "the last stride must be 1");
    check(R >= 0 && R % 2 == 0 && R <= D && D <= INT32_MAX, "the rotated channels must be even and at most D");
    check(dtype >= F32 && dtype <= F16, "the dtype must be fp32, bf16 or fp16");
    const int64_t size = element_size(dtype);
    const Kernels& k = active();
    parallel_for(B * L, threads, [&](int64_t i) {  // one position, every head: its angles are read once
        const int64_t b = i / L, l = i % L, angle = b * angle_stride + l * (R / 2);
        for (int64_t h = 0; h < H; h++)
            k.rotate({reinterpret_cast<const char*>(x) +
                          size * (b * x_strides[0] + h * x_strides[1] + l * x_strides[2]),
                reinterpret_cast<char*>(out) + size * (b * out_strides[0] + h * out_strides[1] + l * out_strides[2]),
                dtype, reinterpret_cast<const float*>(cos) + angle, reinterpret_cast<const float*>(sin) + angle, int(D),
                R, interleaved});
    });
}

}  // namespace fastlm
