// One chunk of AdamW. 28 bytes per element in fp32 (read p, g, m, v; write p, m, v): memory is the limit, arithmetic is not.
#include "isa.h"

namespace fastlm {
namespace FASTLM_ISA {

static void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int n, float coefficient, const AdamW& rule) {
    const AdamW c = rule;  // a local copy keeps the constants in registers
    for (int i = 0; i < n; i++) adamw(p[i], coefficient * g[i], m[i], v[i], c);
}

void adamw_chunk(Span p, Span g, Span m, Span v, int64_t n, float coefficient, const AdamW& c) {
    float pb[BLOCK], gb[BLOCK], mb[BLOCK], vb[BLOCK];
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        void *po = at(p.data, p.dtype, o), *go = at(g.data, g.dtype, o), *mo = at(m.data, m.dtype, o), *vo = at(v.data, v.dtype, o);
        float *pf = load(po, p.dtype, pb, b), *gf = load(go, g.dtype, gb, b), *mf = load(mo, m.dtype, mb, b), *vf = load(vo, v.dtype, vb, b);
        update(pf, gf, mf, vf, b, coefficient, c);
        store(pf, po, p.dtype, b), store(mf, mo, m.dtype, b), store(vf, vo, v.dtype, b);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
