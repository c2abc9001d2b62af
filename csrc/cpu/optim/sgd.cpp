// One chunk of SGD: 12 bytes per element in fp32 (reads p, g; writes p), 20 with momentum.
#include "parameter.h"

namespace fastlm {
namespace FASTLM_ISA {

static void update(float* __restrict p, const float* __restrict g, float* __restrict buffer, int n, float coefficient,
    const Sgd& rule) {
    const Sgd c = rule;
    for (int i = 0; i < n; i++) sgd(p[i], coefficient * g[i], buffer[i], c);
}

static void update(float* __restrict p, const float* __restrict g, int n, float coefficient, const Sgd& rule) {
    const Sgd c = rule;
    for (int i = 0; i < n; i++) sgd(p[i], coefficient * g[i], c);
}

void sgd_chunk(const Parameter& p, Span g, Span buffer, int64_t n, float coefficient, const Sgd& c) {
    float pb[SHORT], gb[SHORT], bb[SHORT];
    for (int64_t o = 0; o < n; o += SHORT) {
        const int b = n - o < SHORT ? int(n - o) : SHORT;
        float *pf = load(p, o, pb, b), *gf = load(g, o, gb, b);
        if (buffer.data == nullptr) {
            update(pf, gf, b, coefficient, c);
        } else {
            float* bf = load(buffer, o, bb, b);
            update(pf, gf, bf, b, coefficient, c);
            store(bf, buffer, o, b);
        }
        store(pf, p, o, b);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
