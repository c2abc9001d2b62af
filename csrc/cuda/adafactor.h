/* Adafactor's arithmetic on a GPU, as host and device code: tests run it on the host. rules/adafactor.h has the scheme,
panels.h how tensors are cut, adafactor.cu the kernels.

A warp sums the squares of a row of a panel, and knows R_i. When all rows of the panel are known, every thread walks
down columns of it and writes what its rows add to the two column sums, reading the gradient a second time, from a
cache. */
#pragma once

#include "../rules/adafactor.h"
#include "panels.h"
#include "squares.h"

namespace fastlm {

// Σ θ²; Σ U² of a chunk that is not factored; Σ R_i, min R_i where there is a gradient
struct PanelSums {
    double p, u, R, smallest_R;
};
struct StripSums {
    double u;
    bool may_bind;
};  // Σ U² of its columns, and whether that may be wrong

// ---------------------------------------------------------------------------------------------------------------------
// The first pass

FASTLM_RULE void scale(float (&x)[1][VECTOR], float coefficient) {
#pragma unroll
    for (int e = 0; e < VECTOR; e++) x[0][e] *= coefficient;
}

// One lane's part of Σ_j G_ij² of row r of a panel.
FASTLM_RULE double row_squares(const Item& x, const Panel& panel, int r, float coefficient, int lane) {
    double sum = 0.0;
    map<0, 4, WARP>(
        run_of<G>(x, panel.begin + int64_t(r) * x.columns, int(x.columns)), lane, [&](float (&g)[1][VECTOR], int) {
            scale(g, coefficient);
            sum += sum_of_squares(g[0]);
        });
    return sum;
}

// Update R_i from the row's sum and return what its G² are multiplied by in Σ_i G²/R_i.
FASTLM_RULE float finish_row(const Item& x, const Panel& panel, int r, double sum, const Adafactor& c) {
    float& R = x.R[panel.row + r];
    R = ema(R, float(sum / double(x.columns)), c);
    return sum == 0.0 ? 0.0f : 1.0f / R;  // a row without gradient adds nothing to U, whatever its average
}

// One thread's part of the panel's column sums.
FASTLM_RULE void column_sums(const Item& x, const Panel& panel, const float* inverse, float coefficient, int thread) {
    const Chunk<1> all = run_of<G>(x, panel.begin, 0);
    const bool whole = aligned(all) && x.columns % VECTOR == 0;
    const int64_t row_bytes = int64_t(x.columns) * element_size(all.dtype[0]);
    float *const c_sums = sums_of(x, panel.number), *const w_sums = c_sums + x.columns;
    for (int i = thread; VECTOR * i < int(x.columns); i += THREADS) {
        float c[VECTOR] = {}, w[VECTOR] = {};
#pragma unroll 4
        for (int r = 0; r < panel.rows; r++) {
            const char* row = static_cast<const char*>(all.data[0]) + r * row_bytes;
            float g[1][VECTOR];
            widen_vector(
                whole ? load_vector(row, all.dtype[0], i) : load_elements(row, all.dtype[0], i, int(x.columns)),
                all.dtype[0], g[0]);
            scale(g, coefficient);
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                const float square = g[0][e] * g[0][e];
                c[e] += square;
                w[e] += square * inverse[r];
            }
        }
#pragma unroll
        for (int e = 0; e < VECTOR; e++)
            if (VECTOR * i + e < int(x.columns)) {
                c_sums[VECTOR * i + e] = c[e];
                w_sums[VECTOR * i + e] = w[e];
            }
    }
}

// Σ R_i and min R_i, in order.
FASTLM_RULE void sum_rows(const Item& x, const Panel& panel, const float* inverse, PanelSums& sums) {
    sums.R = 0.0;
    sums.smallest_R = HUGE_VAL;
    for (int r = 0; r < panel.rows; r++) {
        const double R = x.R[panel.row + r];
        sums.R += R;
        if (inverse[r] != 0.0f && R < sums.smallest_R) sums.smallest_R = R;
    }
}

// One thread's part of Σ θ².
template <Precision PRECISION>
FASTLM_RULE double parameter_squares(const Item& x, const Panel& panel, int thread) {
    const Chunk<REST<PRECISION>> chunk = parameter_run<PRECISION>(x, panel.begin, int(panel.n));
    double sum = 0.0;
    map<0, 2>(chunk, thread, [&](float (&p)[REST<PRECISION>][VECTOR], int) {
        float theta[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; e++) theta[e] = read<PRECISION>(p, e, chunk.dtype);
        sum += sum_of_squares(theta);
    });
    return sum;
}

// One thread's part of Σ U² of a chunk that is not factored, whose averages it updates: one vector in flight, because
// with more `map` comes to vectors past the end, of which the first may hold elements that come again.
FASTLM_RULE double average_squares(
    const Item& x, const Panel& panel, float coefficient, const Adafactor& c, int thread) {
    float* const v = x.R + panel.begin;
    double sum = 0.0;
    map<0, 1>(run_of<G>(x, panel.begin, int(panel.n)), thread, [&](float (&g)[1][VECTOR], int i) {
        scale(g, coefficient);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            const int o = VECTOR * i + e;
            if (o >= int(panel.n)) continue;
            v[o] = ema(v[o], g[0][e] * g[0][e], c);
            g[0][e] *= factored_rate(1.0f, 1.0f / sqrtf(v[o]), c);
        }
        sum += sum_of_squares(g[0]);
    });
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Between the passes

struct Column {
    double c, w;
};  // Σ_i G_ij², Σ_i G_ij²/R_i

// Column j of a strip over every SLICES-th panel of its matrix.
FASTLM_RULE Column column_of(const Item& x, const Strip& strip, int j, int slice) {
    Column sum = {0.0, 0.0};
#pragma unroll 4
    for (uint32_t q = slice; q < strip.panels; q += SLICES) {
        const float* c = sums_of(x, strip.panel - x.panels + q) + strip.first + j;
        sum.c += c[0];
        sum.w += c[x.columns];
    }
    return sum;
}

// Update C_j and b_j, and give the column's part of Σ U² and its C_j, both neutral where it has no gradient.
FASTLM_RULE void finish_column(const Item& x, const Strip& strip, int j, const Column& sum, double mean,
    const Adafactor& c, double& u, double& smallest_C) {
    const int64_t at = int64_t(strip.matrix) * x.columns + strip.first + j;
    const float C = x.C[at] = ema(x.C[at], float(sum.c / double(x.rows)), c);
    x.b[at] = float(1.0 / sqrt(double(C)));
    u = sum.c == 0.0 ? 0.0 : mean * (sum.w / double(C));
    smallest_C = sum.c == 0.0 ? HUGE_VAL : double(C);
}

// One thread's part of a_i: a strip does as many rows of its matrix as each other strip.
FASTLM_RULE void row_factors(const Item& x, const Strip& strip, double mean, int thread) {
    const int64_t begin = int64_t(strip.matrix) * x.rows, strips = divided(x.columns, STRIP);
    for (int64_t i = int64_t(strip.number) * THREADS + thread; i < x.rows; i += strips * THREADS)
        x.a[begin + i] = float(sqrt(mean / double(x.R[begin + i])));
}

// ---------------------------------------------------------------------------------------------------------------------
// The second pass

struct Place {
    uint32_t row, column;
};  // of an element, the row counted over the tensor's matrices

FASTLM_RULE Place place_of(const Item& x, int64_t element) {
    return x.columns == 0 ? Place{0, 0} : Place{uint32_t(element / x.columns), uint32_t(element % x.columns)};
}

// 1/√V of element o of a piece that begins at `first`; past the end, of the last.
FASTLM_RULE float rate_of(const Item& x, const Piece& piece, const Place& first, int o, const Adafactor& c) {
    o = o < piece.n ? o : piece.n - 1;
    if (x.columns == 0) return factored_rate(1.0f, 1.0f / sqrtf(x.R[piece.begin + o]), c);
    const uint32_t flat = first.column + uint32_t(o), i = first.row + flat / x.columns, j = flat % x.columns;
    const uint32_t matrix = x.matrices == 1 ? 0 : i / uint32_t(x.rows);
    return factored_rate(x.a[i], x.b[int64_t(matrix) * x.columns + j], c);
}

// One thread's part of Σ U² of a piece, where the bound may bind.
FASTLM_RULE double bounded_squares(
    const Item& x, const Piece& piece, float coefficient, const Adafactor& c, int thread) {
    const Place first = place_of(x, piece.begin);
    double sum = 0.0;
    map<0, 2>(run_of<G>(x, piece.begin, piece.n), thread, [&](float (&g)[1][VECTOR], int i) {
        scale(g, coefficient);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) g[0][e] *= rate_of(x, piece, first, VECTOR * i + e, c);
        sum += sum_of_squares(g[0]);
    });
    return sum;
}

// One thread's part of the update of a piece.
template <Precision PRECISION, bool MOMENTUM>
FASTLM_RULE void apply_piece(
    const Item& x, const Piece& piece, float coefficient, const Now<Adafactor>& now, int thread) {
    constexpr int GRAD = REST<PRECISION>, BUFFER = GRAD + 1, ALL = GRAD + 1 + MOMENTUM;
    const Place first = place_of(x, piece.begin);
    const Adafactor& c = now.rule;
    const float s = c.step_size * coefficient;
    const auto update = [&](const auto& chunk) {
        map<WRITTEN<PRECISION, MOMENTUM ? 0b10 : 0>, ALL <= 2 ? 2 : 1>(
            chunk, thread, [&](float (&v)[ALL][VECTOR], int i) {
                float theta[VECTOR];
#pragma unroll
                for (int e = 0; e < VECTOR; e++) {
                    const float u = s * v[GRAD][e] * rate_of(x, piece, first, VECTOR * i + e, c);
                    theta[e] = read<PRECISION>(v, e, chunk.dtype) * c.decay;
                    if constexpr (MOMENTUM) theta[e] -= v[BUFFER][e] = c.beta1 * v[BUFFER][e] + c.one_beta1 * u;
                    else theta[e] -= u;
                }
                write<PRECISION>(theta, v, chunk.dtype[1], piece.begin + VECTOR * i, now.step, now.key);
            });
    };
    if constexpr (MOMENTUM) update(parameter_run<PRECISION, G, M>(x, piece.begin, piece.n));
    else update(parameter_run<PRECISION, G>(x, piece.begin, piece.n));
}

}  // namespace fastlm
