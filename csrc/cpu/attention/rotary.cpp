// One row of the rotary embedding: pairs of channels turned by their angles, in fp32.
#include "../isa.h"

namespace fastlm {
namespace FASTLM_ISA {

template <typename T>
static inline void turn(const T* __restrict x, T* __restrict out, const float* __restrict cos,
    const float* __restrict sin, int pairs, int step, int partner) {
    for (int i = 0; i < pairs; i++) {
        const float x1 = widen(x[i * step]), x2 = widen(x[i * step + partner]);
        narrow(x1 * cos[i] - x2 * sin[i], out[i * step]);
        narrow(x2 * cos[i] + x1 * sin[i], out[i * step + partner]);
    }
}

template <typename T>
static inline void rotate_as(const Rotation& row) {
    const T* x = static_cast<const T*>(row.x);
    T* out = static_cast<T*>(row.out);
    const int pairs = row.R / 2;
    if (row.interleaved) turn(x, out, row.cos, row.sin, pairs, 2, 1);
    else turn(x, out, row.cos, row.sin, pairs, 1, pairs);
    for (int i = row.R; i < row.D; i++) out[i] = x[i];
}

void rotate_row(const Rotation& row) {
    switch (row.dtype) {
        case BF16: return rotate_as<bf16>(row);
        case F16: return rotate_as<f16>(row);
        default: return rotate_as<float>(row);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
