// Rows of layer norm and RMS norm, and of their gradients. A row is read from memory once: what comes after its first
// pass finds it in the cache.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

// Where the row at element o of x is made: there if x is fp32, else in buffer, from which `store` rounds it.
static float* place(Span x, int64_t o, float* buffer) {
    return x.dtype == F32 ? static_cast<float*>(at(x.data, F32, o)) : buffer;
}

// A row of s = x + residual, in fp32 as it is stored. workspace: 2 D elements
static const float* add(const Norm& a, int64_t o, float* workspace) {
    const int D = int(a.D);
    const float* x = load(a.x, o, workspace, D);
    if (!a.residual.data) return x;
    const float* r = load(a.residual, o, workspace + D, D);
    float* s = place(a.s, o, workspace);
    each(D, [&](auto lane, int64_t i) { put(s + i, take(lane, x + i) + take(lane, r + i)); });
    store(s, a.s, o, D);
    return load(a.s, o, workspace, D);
}

void norm_rows(const Norm& a, int64_t begin, int64_t end, float* workspace) {
    const int D = int(a.D);
    const float inverse = 1.0f / float(D);
    for (int64_t row = begin; row < end; row++) {
        const int64_t o = row * D;
        const float* s = add(a, o, workspace);
        const float mean = a.mean ? inverse * sum(D, [&](auto lane, int64_t i) { return take(lane, s + i); }) : 0.0f;
        const float variance = inverse * sum(D, [&](auto lane, int64_t i) {
            const auto c = take(lane, s + i) - mean;
            return c * c;
        });
        const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps);
        if (a.mean) a.mean[row] = mean;
        a.rstd[row] = rstd;

        float *y = place(a.y, o, workspace + D), *rounded = workspace + 2 * D;
        const auto n = [&](auto lane, int64_t i) { return (take(lane, s + i) - mean) * rstd; };
        const auto affine = [&](auto n, int64_t i) { return n * take(n, a.weight + i) + take(n, a.bias + i); };
        if (a.rounds_first) {
            each(D, [&](auto lane, int64_t i) { put(y + i, n(lane, i)); });
            store(y, rounded, a.y.dtype, D);
            y = load(rounded, a.y.dtype, y, D);
            each(D, [&](auto lane, int64_t i) { put(y + i, affine(take(lane, y + i), i)); });
        } else {
            each(D, [&](auto lane, int64_t i) { put(y + i, affine(n(lane, i), i)); });
        }
        store(y, a.y, o, D);
    }
}

void norm_backward_rows(
    const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias, float* workspace) {
    const int D = int(a.D);
    const float inverse = 1.0f / float(D);
    float* zeros = workspace + 3 * D;
    each(D, [&](auto zero, int64_t i) { put(dweight + i, zero), put(dbias + i, zero), put(zeros + i, zero); });
    for (int64_t row = begin; row < end; row++) {
        const int64_t o = row * D;
        const float *dy = load(a.dy, o, workspace, D), *s = load(a.s, o, workspace + D, D),
                    *ds = a.ds.data ? load(a.ds, o, workspace + 2 * D, D) : zeros;
        float* dx = place(a.dx, o, workspace + 2 * D);
        const float mean = a.mean ? a.mean[row] : 0.0f, rstd = a.rstd[row];
        const auto n = [&](auto lane, int64_t i) { return (take(lane, s + i) - mean) * rstd; };
        const auto g = [&](auto lane, int64_t i) { return take(lane, dy + i) * take(lane, a.weight + i); };
        const float along = inverse * sum(D, [&](auto lane, int64_t i) { return g(lane, i) * n(lane, i); });
        const float level = a.mean ? inverse * sum(D, g) : 0.0f;
        each(D, [&](auto lane, int64_t i) {
            const auto of_y = take(lane, dy + i), normed = n(lane, i);
            put(dx + i, rstd * (g(lane, i) - level - normed * along) + take(lane, ds + i));
            put(dweight + i, take(lane, dweight + i) + of_y * normed);
            put(dbias + i, take(lane, dbias + i) + of_y);
        });
        store(dx, a.dx, o, D);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
