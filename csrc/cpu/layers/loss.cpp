// Rows of logits in place: what their cross entropy is made of in one pass over memory, their gradient in a second one.
// Formulas: fastlm/ops/linear_cross_entropy.py.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr float INFINITE = __builtin_inff();

// n logits → z, in their place
static void cap(const Logits& c, float* x, int n) {
    const float inverse = 1.0f / c.temperature;
    if (c.softcap == 0.0f) {
        if (c.temperature == 1.0f) return;
        each(n, [&](auto lane, int64_t i) { put(x + i, take(lane, x + i) * inverse); });
        return;
    }
    const float into = 1.0f / c.softcap, out = c.softcap * inverse;
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, tanh(load(x + i) * into) * out);
    store(x + i, tanh(load(x + i, n - i, 0.0f) * into) * out, n - i);
}

static float largest(const float* z, int n) {
    V m = V{} - INFINITE;
    int i = 0;
    for (; i + W <= n; i += W) m = max(m, load(z + i));
    m = max(m, load(z + i, n - i, -INFINITE));
    float most = m[0];
    for (int l = 1; l < W; l++) most = m[l] > most ? m[l] : most;
    return most;
}

// Σ exp(z - top)
static float powers(const float* z, int n, float top) {
    V s = {};
    int i = 0;
    for (; i + W <= n; i += W) s += exp(load(z + i) - top);
    s += exp(load(z + i, n - i, -INFINITE) - top);
    float total = 0.0f;
    for (int l = 0; l < W; l++) total += s[l];
    return total;
}

RowLoss logits_measure(const Logits& c, float* x, int64_t label) {
    float top = -INFINITE;
    double shares = 0.0, total = 0.0;  // Σ exp(z - top), Σ z
    for (int64_t o = 0; o < c.V; o += BLOCK) {
        const int n = c.V - o < BLOCK ? int(c.V - o) : BLOCK;
        float* z = x + o;
        cap(c, z, n);
        const float before = top, most = largest(z, n);
        top = most > top ? most : top;
        shares = shares * double(exp(V{} + (before - top))[0]) + double(powers(z, n, top));
        if (c.label_smoothing != 0.0f) total += double(sum(n, [&](auto lane, int64_t i) { return take(lane, z + i); }));
    }
    const double mean = total / double(c.V), smoothing = c.label_smoothing;
    return {float(double(top) + __builtin_log(shares)), float((1.0 - smoothing) * double(x[label]) + smoothing * mean)};
}

void logits_gradient(const Logits& c, float* z, int64_t label, float lse, float scale, float g) {
    const float even = g * (c.label_smoothing / float(c.V)), inverse = 1.0f / c.temperature,
                back = c.softcap == 0.0f ? 0.0f : c.temperature / c.softcap;
    // dz/dx, 1 - tanh² over the temperature
    const auto slope = [&](auto v) { return (1.0f - (v * back) * (v * back)) * inverse; };
    const auto gradient = [&](V v) { return (exp(v - lse) * scale - even) * slope(v); };
    const float at_label = (1.0f - c.label_smoothing) * g * slope(z[label]);
    int64_t i = 0;
    for (; i + W <= c.V; i += W) store(z + i, gradient(load(z + i)));
    store(z + i, gradient(load(z + i, int(c.V - i), 0.0f)), int(c.V - i));
    z[label] -= at_label;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
