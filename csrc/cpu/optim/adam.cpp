// One chunk of AdamW, Adam and LAMB. AdamW moves 28 bytes per element in fp32 (reads p, g, m, v; writes p, m, v), LAMB
// 12 more, or none where the second pass finds its data in the cache: memory is the limit, arithmetic is not.
#include "parameter.h"
#include "squares.h"

namespace fastlm {
namespace FASTLM_ISA {

static void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int n,
    float coefficient, const Adam& rule) {
    const Adam c = rule;  // a local copy keeps the constants in registers
    for (int i = 0; i < n; i++) adam(p[i], coefficient * g[i], m[i], v[i], c);
}

constexpr int RUN = 32;

// The same where all four are bf16, RUN elements at most: buffers of whole blocks would double the work.
static inline __attribute__((always_inline)) void update_run(
    bf16* p, const bf16* g, bf16* m, bf16* v, int n, float coefficient, const Adam& c) {
    float pf[RUN], mf[RUN], vf[RUN];
    for (int i = 0; i < n; i++) {
        pf[i] = widen(p[i]);
        mf[i] = widen(m[i]);
        vf[i] = widen(v[i]);
        adam(pf[i], coefficient * widen(g[i]), mf[i], vf[i], c);
    }
    narrow_all(pf, p, n);
    narrow_all(mf, m, n);
    narrow_all(vf, v, n);
}

static void update_bf16(void* pd, const void* gd, void* md, void* vd, int64_t n, float coefficient, const Adam& rule) {
    bf16 *p = static_cast<bf16*>(pd), *m = static_cast<bf16*>(md), *v = static_cast<bf16*>(vd);
    const bf16* g = static_cast<const bf16*>(gd);
    const Adam c = rule;
    int64_t o = 0;
    for (; o + RUN <= n; o += RUN) update_run(p + o, g + o, m + o, v + o, RUN, coefficient, c);
    update_run(p + o, g + o, m + o, v + o, int(n - o), coefficient, c);
}

static void moments(const float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
    int n, float coefficient, const Adam& rule) {
    const Adam c = rule;
    for (int i = 0; i < n; i++) adam_moments(p[i], coefficient * g[i], m[i], v[i], c);
}

static void direction(const float* __restrict p, const float* __restrict m, const float* __restrict v,
    float* __restrict r, int n, const Adam& rule) {
    const Adam c = rule;
    for (int i = 0; i < n; i++) r[i] = c.r_scale * adam_direction(m[i], v[i], c) + c.r_decay * p[i];
}

static void apply(float* __restrict p, const float* __restrict m, const float* __restrict v, int n, const Adam& rule) {
    const Adam c = rule;
    for (int i = 0; i < n; i++) p[i] = adam_apply(p[i], m[i], v[i], c);
}

void adamw_chunk(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c) {
    const bool alone = p.master.data == nullptr && !p.stochastic;
    if (alone && p.stored.dtype == BF16 && g.dtype == BF16 && m.dtype == BF16 && v.dtype == BF16)
        return update_bf16(p.stored.data, g.data, m.data, v.data, n, coefficient, c);
    float pb[SHORT], gb[SHORT], mb[SHORT], vb[SHORT];
    for (int64_t o = 0; o < n; o += SHORT) {
        const int b = n - o < SHORT ? int(n - o) : SHORT;
        float *pf = load(p, o, pb, b), *gf = load(g, o, gb, b), *mf = load(m, o, mb, b), *vf = load(v, o, vb, b);
        update(pf, gf, mf, vf, b, coefficient, c);
        store(pf, p, o, b);
        store(mf, m, o, b);
        store(vf, v, o, b);
    }
}

// The moments and both sums in one loop, in which square roots and divisions hide behind memory; n ≤ BLOCK.
static void measure(
    const float* p, const float* g, float* m, float* v, int n, float coefficient, const Adam& rule, Squares& sums) {
    constexpr int EACH = LANES / W;
    const Adam c = rule;
    V of_p[EACH] = {}, of_r[EACH] = {};
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < EACH; l++) {
            const int o = i + l * W;
            const V pf = load(p + o), gf = coefficient * load(g + o) + c.l2 * pf;
            const V mf = c.beta1 * load(m + o) + c.one_beta1 * gf, vf = c.beta2 * load(v + o) + c.one_beta2 * (gf * gf);
            store(m + o, mf);
            store(v + o, vf);
            const V r = c.r_scale * (mf / (root(vf) * c.root_scale + c.eps)) + c.r_decay * pf;
            of_p[l] += pf * pf;
            of_r[l] += r * r;
        }
    float p_sums[LANES], r_sums[LANES], r[BLOCK];
    for (int l = 0; l < EACH; l++) {
        store(p_sums + l * W, of_p[l]);
        store(r_sums + l * W, of_r[l]);
    }
    moments(p + i, g + i, m + i, v + i, n - i, coefficient, c);
    direction(p + i, m + i, v + i, r + i, n - i, c);
    for (int l = 0; i + l < n; l++) {
        p_sums[l] += p[i + l] * p[i + l];
        r_sums[l] += r[i + l] * r[i + l];
    }
    const float p_sum = folded(p_sums), r_sum = folded(r_sums);
    sums.p += in_range(p_sum) ? double(p_sum) : wide_squares(p, n, 1.0f);
    if (!in_range(r_sum)) direction(p, m, v, r, n, c);
    sums.r += in_range(r_sum) ? double(r_sum) : wide_squares(r, n, 1.0f);
}

Squares lamb_moments_chunk(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c) {
    float pb[BLOCK], gb[BLOCK], mb[BLOCK], vb[BLOCK];
    Squares sums = {0.0, 0.0};
    const bool exact = m.dtype == F32 && v.dtype == F32;  // what is stored is what was computed
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        float *pf = load(p, o, pb, b), *gf = load(g, o, gb, b), *mf = load(m, o, mb, b), *vf = load(v, o, vb, b);
        if (exact) {
            measure(pf, gf, mf, vf, b, coefficient, c, sums);
            continue;
        }
        // m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g²
        moments(pf, gf, mf, vf, b, coefficient, c);
        store(mf, m, o, b);
        store(vf, v, o, b);
        // as the second pass will find them
        mf = load(m, o, mb, b);
        vf = load(v, o, vb, b);
        // r = m̂ / (√v̂ + ε) + λ θ, in the place of g, and what the block adds to ‖θ‖² and ‖r‖²
        direction(pf, mf, vf, gb, b, c);
        sums.p += squares(pf, b);
        sums.r += squares(gb, b);
    }
    return sums;
}

void lamb_apply_chunk(const Parameter& p, Span m, Span v, int64_t n, const Adam& c) {
    float pb[SHORT], mb[SHORT], vb[SHORT];
    for (int64_t o = 0; o < n; o += SHORT) {
        const int b = n - o < SHORT ? int(n - o) : SHORT;
        float *pf = load(p, o, pb, b), *mf = load(m, o, mb, b), *vf = load(v, o, vb, b);
        apply(pf, mf, vf, b, c);
        store(pf, p, o, b);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
