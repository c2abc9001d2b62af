// Activations of rows, gated or not: y = f(gate) · up of rows [gate, up], or f(x); and their gradients from x alone.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

struct Curve {
    V f, slope;  // f(x), f'(x); where one is not read, the compiler leaves it out
};

struct Sigmoid {
    V at, rest;  // σ(x), σ(-x) = 1 - σ(x), neither by a difference
};

static FASTLM_INLINE Sigmoid sigmoid(V x) {
    const V t = exp(x < 0.0f ? x : -x), large = 1.0f / (1.0f + t), small = t * large;
    return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

struct Silu {
    static FASTLM_INLINE Curve at(V x) {
        const Sigmoid s = sigmoid(x);
        return {x * s.at, s.at + x * s.at * s.rest};
    }
};

// x · ½ (1 + tanh u) = x · σ(2u), u = √(2/π) (x + 0.044715 x³)
struct GeluTanh {
    static FASTLM_INLINE Curve at(V x) {
        const V square = x * x;
        const Sigmoid s = sigmoid(1.5957691216f * x * (1.0f + 0.044715f * square));
        return {x * s.at, s.at + x * s.at * s.rest * (1.5957691216f * (1.0f + 0.134145f * square))};
    }
};

// x · Φ(x), where Φ(-a) = e^(-a²/2) · t p(t), t = 1 / (1 + 0.35 a): p is the best of its degree, 3.1e-8 from it for
// a ≤ 13, beyond which Φ(-a) is 0 in fp32.
struct Gelu {
    static FASTLM_INLINE Curve at(V x) {
        const V a = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.35f * a), density = exp(-0.5f * x * x);
        V p = broadcast(PHI[8]);
        for (int i = 7; i >= 0; i--) p = fma(p, t, broadcast(PHI[i]));
        const V tail = t * p * density, phi = x < 0.0f ? tail : 1.0f - tail;
        return {x * phi, phi + x * density * 0.3989422804f};
    }
    static constexpr float PHI[] = {1.396218282e-01f, 1.398547488e-01f, 1.198827623e-01f, 1.053169222e-01f,
        -2.267082007e-02f, 1.585523507e-01f, -2.551822603e-01f, 1.437195483e-01f, -2.909509589e-02f};
};

struct Relu {
    static FASTLM_INLINE Curve at(V x) { return {x < 0.0f ? V{} : x, x > 0.0f ? V{} + 1.0f : V{}}; }
};

struct Tanh {
    static FASTLM_INLINE Curve at(V x) {
        const V y = tanh(x);
        return {y, 1.0f - y * y};
    }
};

// f and, unless it is null, slope of n elements.
template <class Activation>
static void curve(const float* x, float* f, float* slope, int n) {
    int i = 0;
    for (; !slope && i + W <= n; i += W) store(f + i, Activation::at(load(x + i)).f);
    for (; i + W <= n; i += W) {
        const Curve c = Activation::at(load(x + i));
        store(f + i, c.f), store(slope + i, c.slope);
    }
    const Curve c = Activation::at(load(x + i, n - i, 0.0f));
    store(f + i, c.f, n - i);
    if (slope) store(slope + i, c.slope, n - i);
}

static void curve(int activation, const float* x, float* f, float* slope, int n) {
    switch (activation) {
        case GELU: return curve<Gelu>(x, f, slope, n);
        case GELU_TANH: return curve<GeluTanh>(x, f, slope, n);
        case RELU: return curve<Relu>(x, f, slope, n);
        case SILU: return curve<Silu>(x, f, slope, n);
        default: return curve<Tanh>(x, f, slope, n);
    }
}

void gate_rows(const Gate& a, int64_t begin, int64_t end) {
    float xs[SHORT], ups[SHORT], f[SHORT];
    for (int64_t row = begin; row < end; row++)
        for (int64_t o = 0; o < a.H; o += SHORT) {
            const int n = a.H - o < SHORT ? int(a.H - o) : SHORT;
            const int64_t i = row * a.H * (1 + a.gated) + o;
            float* y = a.y.dtype == F32 ? static_cast<float*>(at(a.y.data, F32, row * a.H + o)) : f;
            curve(a.activation, load(a.x, i, xs, n), y, nullptr, n);
            if (a.gated) {
                const float* up = load(a.x, i + a.H, ups, n);
                each(n, [&](auto lane, int64_t j) { put(y + j, take(lane, y + j) * take(lane, up + j)); });
            }
            store(y, a.y, row * a.H + o, n);
        }
}

void gate_backward_rows(const Gate& a, int64_t begin, int64_t end) {
    float xs[SHORT], ups[SHORT], dys[SHORT], f[SHORT], slope[SHORT];
    for (int64_t row = begin; row < end; row++)
        for (int64_t o = 0; o < a.H; o += SHORT) {
            const int n = a.H - o < SHORT ? int(a.H - o) : SHORT;
            const int64_t i = row * a.H * (1 + a.gated) + o;
            const float* dy = load(a.y, row * a.H + o, dys, n);
            curve(a.activation, load(a.x, i, xs, n), f, slope, n);
            float* dx = a.dx.dtype == F32 ? static_cast<float*>(at(a.dx.data, F32, i)) : xs;
            if (!a.gated) {
                each(n, [&](auto lane, int64_t j) { put(dx + j, take(lane, dy + j) * take(lane, slope + j)); });
                store(dx, a.dx, i, n);
                continue;
            }
            const float* up = load(a.x, i + a.H, ups, n);
            float* dup = a.dx.dtype == F32 ? dx + a.H : f;
            each(n, [&](auto lane, int64_t j) {
                const auto of_y = take(lane, dy + j);
                put(dx + j, of_y * take(lane, up + j) * take(lane, slope + j));
                put(dup + j, of_y * take(lane, f + j));
            });
            store(dx, a.dx, i, n), store(dup, a.dx, i + a.H, n);
        }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
