// Reading gradients before a step: their sum of squares, and unscaling in place with a check for overflow.
#include "squares.h"

namespace fastlm {
namespace FASTLM_ISA {

double sum_of_squares_chunk(Span g, int64_t n) {
    double sum = 0.0;
    float buffer[BLOCK];
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        sum += squares(load(g, o, buffer, b), b);
    }
    return sum;
}

bool unscale_chunk(Span g, int64_t n, float factor) {
    float buffer[BLOCK];
    uint32_t bad = 0;
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        void* data = at(g.data, g.dtype, o);
        float* x = load(data, g.dtype, buffer, b);
        for (int i = 0; i < b; i++) {
            bad |= (as_bits(x[i]) & 0x7f800000u) == 0x7f800000u;  // an exponent of all ones is inf or NaN
            x[i] *= factor;
        }
        store(x, data, g.dtype, b);
    }
    return bad;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
