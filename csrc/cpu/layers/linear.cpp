// A linear layer of few rows: each row of the weight is read once, for all rows of x.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

static FASTLM_INLINE V wide(const float* p) { return load(p); }

static FASTLM_INLINE V wide(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    V x;
    for (int l = 0; l < W; l++) x[l] = widen(p[l]);
    return x;
#endif
}

static FASTLM_INLINE V wide(const f16* p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    V x;
    for (int l = 0; l < W; l++) x[l] = widen(p[l]);
    return x;
#endif
}

// out[r * FEW_OUTPUTS + p] = ⟨row p of weight, row r of x⟩ for P rows of weight, side by side in memory. Those after
// them are asked for meanwhile, for a row is too short to be foreseen.
template <int R, int P, class T>
static FASTLM_INLINE void products(const Linear& a, const T* weight, float* out) {
    V sums[P][R] = {};
    const int64_t K = a.K, whole = K / W * W;
    for (int64_t i = 0; i < whole; i += W) {
        V w[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            w[p] = wide(weight + p * K + i);
            __builtin_prefetch(weight + (p + P) * K + i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const V x = load(a.x + r * K + i);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) sums[p][r] = fma(w[p], x, sums[p][r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            float total = 0.0f;
            for (int l = 0; l < W; l++) total += sums[p][r][l];
            for (int64_t i = whole; i < K; i++) total += widen(weight[p * K + i]) * a.x[r * K + i];
            out[r * FEW_OUTPUTS + p] = total;
        }
}

template <int R, class T>
static void outputs(const Linear& a, int64_t begin, int64_t end) {
    constexpr int P = R <= 4 ? 4 : 2;
    float out[R * FEW_OUTPUTS];
    const T* weight = static_cast<const T*>(a.weight.data) + begin * a.K;
    const int n = int(end - begin);
    int o = 0;
    for (; o + P <= n; o += P) products<R, P>(a, weight + o * a.K, out + o);
    for (; o < n; o++) products<R, 1>(a, weight + o * a.K, out + o);
    for (int r = 0; r < R; r++) {
        float* y = out + r * FEW_OUTPUTS;
        float* to = a.y.dtype == F32 ? static_cast<float*>(a.y.data) + r * a.N + begin : y;
        each(n, [&](auto lane, int64_t i) {
            put(to + i, take(lane, y + i) + (a.bias ? take(lane, a.bias + begin + i) : lane));
        });
        store(to, a.y, r * a.N + begin, n);
    }
}

template <class T>
static void linear(const Linear& a, int64_t begin, int64_t end) {
    switch (a.rows) {
        case 1: return outputs<1, T>(a, begin, end);
        case 2: return outputs<2, T>(a, begin, end);
        case 3: return outputs<3, T>(a, begin, end);
        case 4: return outputs<4, T>(a, begin, end);
        case 5: return outputs<5, T>(a, begin, end);
        case 6: return outputs<6, T>(a, begin, end);
        case 7: return outputs<7, T>(a, begin, end);
        default: return outputs<8, T>(a, begin, end);
    }
}

void linear_outputs(const Linear& a, int64_t begin, int64_t end) {
    switch (a.weight.dtype) {
        case BF16: return linear<bf16>(a, begin, end);
        case F16: return linear<f16>(a, begin, end);
        default: return linear<float>(a, begin, end);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
