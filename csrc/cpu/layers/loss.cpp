// Rows of logits: what their cross entropy is made of in one pass over memory, and their gradient, in their place, in a
// second one. Formulas: fastlm/ops/linear_cross_entropy.py. A logit may be -∞, whose word has no share. The bias is
// added in each pass, for it stays in the cache.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr float INFINITE = __builtin_inff();

// z of n ≤ BLOCK logits, of words o, o + 1, …: the products row themselves, or made in buffer.
static const float* scores(const Logits& c, void* row, int64_t o, float* buffer, int n) {
    const float* x = load(Span{row, c.dtype}, o, buffer, n);
    if (c.bias) {
        each(n, [&](auto lane, int64_t i) { put(buffer + i, take(lane, x + i) + take(lane, c.bias + o + i)); });
        x = buffer;
    }
    if (c.softcap == 0.0f && c.temperature == 1.0f) return x;
    const float inverse = 1.0f / c.temperature;
    if (c.softcap == 0.0f) {
        each(n, [&](auto lane, int64_t i) { put(buffer + i, take(lane, x + i) * inverse); });
        return buffer;
    }
    const float into = 1.0f / c.softcap, out = c.softcap * inverse;
    int i = 0;
    for (; i + W <= n; i += W) store(buffer + i, tanh(load(x + i) * into) * out);
    store(buffer + i, tanh(load(x + i, n - i, 0.0f) * into) * out, n - i);
    return buffer;
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

RowLoss logits_measure(const Logits& c, void* x, int64_t label) {
    float buffer[BLOCK], top = -INFINITE, at_label = 0.0f;
    double shares = 0.0, total = 0.0;  // Σ exp(z - top), Σ z
    for (int64_t o = 0; o < c.V; o += BLOCK) {
        const int n = c.V - o < BLOCK ? int(c.V - o) : BLOCK;
        const float *z = scores(c, x, o, buffer, n), most = largest(z, n);
        if (most > top) {
            shares *= double(exp(V{} + (top - most))[0]);
            top = most;
        }
        if (top > -INFINITE) shares += double(powers(z, n, top));
        if (c.label_smoothing != 0.0f) total += double(sum(n, [&](auto lane, int64_t i) { return take(lane, z + i); }));
        if (o <= label && label < o + n) at_label = z[label - o];
    }
    const double smoothing = c.label_smoothing, mean = total / double(c.words);
    return {float(double(top) + __builtin_log(shares)), float((1.0 - smoothing) * double(at_label) + smoothing * mean)};
}

void logits_gradient(const Logits& c, void* x, int64_t label, float lse, float scale, float g) {
    float buffer[BLOCK];
    const float even = g * (c.label_smoothing / float(c.words)), of_label = g * (1.0f - c.label_smoothing),
                inverse = 1.0f / c.temperature, back = c.temperature / c.softcap;
    const bool capped = c.softcap != 0.0f;
    // dz/dx: 1 - tanh² over the temperature
    const auto slope = [&](V z) { return capped ? (1.0f - (z * back) * (z * back)) * inverse : V{} + inverse; };
    const auto gradient = [&](V z) { return (exp(z - lse) * scale - even) * slope(z); };
    for (int64_t o = 0; o < c.V; o += BLOCK) {
        const int n = c.V - o < BLOCK ? int(c.V - o) : BLOCK;
        const float* z = scores(c, x, o, buffer, n);
        float* dx = c.dtype == F32 ? static_cast<float*>(x) + o : buffer;
        const bool here = o <= label && label < o + n;
        const float of_wanted = here ? of_label * slope(V{} + z[label - o])[0] : 0.0f;
        int i = 0;
        for (; i + W <= n; i += W) store(dx + i, gradient(load(z + i)));
        store(dx + i, gradient(load(z + i, n - i, 0.0f)), n - i);
        if (here) dx[label - o] -= of_wanted;
        store(dx, Span{x, c.dtype}, o, n);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
