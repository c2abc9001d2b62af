/* What every walk of the backward pass makes once more of a tile of pairs: P = exp(S - L) and dS = P ∘ (dP - δ).
Queries that see nothing, or do not exist, have L = +∞, hence P = 0 without a mask. */
#pragma once

#include "pairs.cuh"

namespace fastlm {

struct Statistics {  // of a query: the log-sum-exp in log₂, and δ
    float lse, delta;
};

// S → P, and dP → dS. of(e): of the query of element e.
template <typename Query>
static __device__ __forceinline__ void probability(FragmentC& s, FragmentC& dp, float to_log2, const Query& of) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const Statistics query = of(e);
        s.x[e] = exp2_approximate(fmaf(s.x[e], to_log2, -query.lse));
        dp.x[e] = s.x[e] * (dp.x[e] - query.delta);
    }
}

// The same of all fragments of 16 queries, of which a lane has two.
template <int N>
static __device__ __forceinline__ void probabilities(
    FragmentC (&s)[1][N], FragmentC (&dp)[1][N], float to_log2, const Statistics (&of)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++) probability(s[0][n], dp[0][n], to_log2, [&](int e) { return of[e / 2]; });
}

}  // namespace fastlm
