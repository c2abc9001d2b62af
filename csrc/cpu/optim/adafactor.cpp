/*
Adafactor on panels: rows of a matrix that one thread takes whole. rules/adafactor.h has the scheme.

The first pass reads four rows at a time twice, the second time from the first-level cache: once for the row sums, then,
with R_i known, to add all four into the panel's column sums, which are then loaded and stored once for four rows. Sums
of a row and of a column of a panel are fp32, of at most BLOCK or a few hundred terms; everything above is fp64.
*/
#include "parameter.h"
#include "squares.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int GROUP = 4;  // rows

static double row_squares(Span g, int64_t n, float coefficient) {
    float buffer[BLOCK];
    double sum = 0.0;
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        sum += squares(load(g, o, buffer, b), b, coefficient);
    }
    return sum;
}

static inline float squared(float x) { return x * x; }

static void add_rows(const float* const (&x)[GROUP], const float (&inverse)[GROUP], int n, float coefficient,
    float* __restrict c, float* __restrict w) {
    const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    const float r0 = inverse[0], r1 = inverse[1], r2 = inverse[2], r3 = inverse[3];
    for (int j = 0; j < n; j++) {
        const float s0 = squared(coefficient * x0[j]), s1 = squared(coefficient * x1[j]),
                    s2 = squared(coefficient * x2[j]), s3 = squared(coefficient * x3[j]);
        c[j] += (s0 + s1) + (s2 + s3);
        w[j] += (s0 * r0 + s1 * r1) + (s2 * r2 + s3 * r3);
    }
}

static void add_row(
    const float* __restrict x, float inverse, int n, float coefficient, float* __restrict c, float* __restrict w) {
    for (int j = 0; j < n; j++) {
        const float s = squared(coefficient * x[j]);
        c[j] += s;
        w[j] += s * inverse;
    }
}

PanelSums adafactor_measure_panel(const Panel& panel, float coefficient, const Adafactor& rule) {
    const int64_t n = panel.columns;
    float buffers[GROUP][BLOCK], inverse[GROUP];
    for (int64_t j = 0; j < n; j++) panel.c[j] = panel.w[j] = 0.0f;
    PanelSums sums = {0.0, 0.0, double(HUGE_VALF)};
    for (int64_t i = 0; i < panel.rows; i += GROUP) {
        const int rows = panel.rows - i < GROUP ? int(panel.rows - i) : GROUP;
        // R ← β R + (1 - β)(mean_j G² + ε₁) of each row
        for (int r = 0; r < rows; r++) {
            float& R = panel.R[i + r];
            const double row = row_squares(at(panel.g, (i + r) * n), n, coefficient);
            R = ema(R, float(row / double(n)), rule);
            sums.R += double(R);
            // a row without gradient adds nothing to U, whatever its average
            inverse[r] = row == 0.0 ? 0.0f : 1.0f / R;
            if (row != 0.0 && double(R) < sums.smallest_R) sums.smallest_R = double(R);
        }
        // what the rows add to Σ_i G² and Σ_i G²/R_i of every column
        for (int64_t o = 0; o < n; o += BLOCK) {
            const int b = n - o < BLOCK ? int(n - o) : BLOCK;
            const float* x[GROUP];
            for (int r = 0; r < rows; r++) x[r] = load(panel.g, (i + r) * n + o, buffers[r], b);
            if (rows == GROUP) add_rows(x, inverse, b, coefficient, panel.c + o, panel.w + o);
            else
                for (int r = 0; r < rows; r++) add_row(x[r], inverse[r], b, coefficient, panel.c + o, panel.w + o);
        }
        // Σ θ² of the same rows
        const int64_t end = (i + rows) * n;
        for (int64_t o = i * n; rule.scaled && o < end; o += BLOCK) {
            const int b = end - o < BLOCK ? int(end - o) : BLOCK;
            sums.p += squares(load(panel.p, o, buffers[0], b), b);
        }
    }
    return sums;
}

// a_i of the row
static inline float row_factor(const Panel& panel, int64_t i) {
    return float(__builtin_sqrt(panel.mean / double(panel.R[i])));
}

// s: what g is multiplied by, besides the factors a of the row and b of the columns
static void directions(const float* __restrict g, const float* __restrict b, float* __restrict u, int n, float a,
    float s, const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) u[j] = s * g[j] * factored_rate(a, b[j], c);
}

static void update(float* __restrict p, const float* __restrict g, const float* __restrict b, int n, float a, float s,
    const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) p[j] = p[j] * c.decay - s * g[j] * factored_rate(a, b[j], c);
}

double adafactor_bounded_panel(const Panel& panel, float coefficient, const Adafactor& rule) {
    float gb[BLOCK], ub[BLOCK];
    double sum = 0.0;
    for (int64_t i = 0; i < panel.rows; i++)
        for (int64_t j = 0; j < panel.columns; j += BLOCK) {
            const int n = panel.columns - j < BLOCK ? int(panel.columns - j) : BLOCK;
            directions(load(panel.g, i * panel.columns + j, gb, n), panel.b + j, ub, n, row_factor(panel, i),
                coefficient, rule);
            sum += squares(ub, n);
        }
    return sum;
}

static void momentum(
    float* __restrict p, const float* __restrict u, float* __restrict m, int n, const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) {
        m[j] = c.beta1 * m[j] + c.one_beta1 * u[j];
        p[j] = p[j] * c.decay - m[j];
    }
}

static inline void apply_momentum(float* p, const float* u, Span m, int64_t o, int n, const Adafactor& rule) {
    float mb[BLOCK];
    float* mf = load(m, o, mb, n);
    momentum(p, u, mf, n, rule);
    store(mf, m, o, n);
}

void adafactor_apply_panel(const Panel& panel, float coefficient, const Adafactor& rule) {
    float pb[BLOCK], gb[BLOCK], ub[BLOCK];
    const float s = rule.step_size * coefficient;
    for (int64_t i = 0; i < panel.rows; i++) {
        const float a = row_factor(panel, i);
        for (int64_t j = 0; j < panel.columns; j += BLOCK) {
            const int n = panel.columns - j < BLOCK ? int(panel.columns - j) : BLOCK;
            const int64_t o = i * panel.columns + j;
            float *p = load(panel.p, o, pb, n), *g = load(panel.g, o, gb, n);
            if (panel.m.data == nullptr) update(p, g, panel.b + j, n, a, s, rule);
            else {
                directions(g, panel.b + j, ub, n, a, s, rule);
                apply_momentum(p, ub, panel.m, o, n, rule);
            }
            store(p, panel.p, o, n);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors that are not factored

static void averages(const float* __restrict g, float* __restrict v, int n, float coefficient, const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) v[j] = ema(v[j], squared(coefficient * g[j]), c);
}

static void directions(
    const float* __restrict g, const float* __restrict v, float* __restrict u, int n, float s, const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) u[j] = s * g[j] * factored_rate(1.0f, 1.0f / sqrtf(v[j]), c);
}

static void update(float* __restrict p, const float* __restrict u, int n, const Adafactor& rule) {
    const Adafactor c = rule;
    for (int j = 0; j < n; j++) p[j] = p[j] * c.decay - u[j];
}

Squares adafactor_measure_run(
    const Parameter& p, Span g, float* v, int64_t n, float coefficient, const Adafactor& rule) {
    float pb[BLOCK], gb[BLOCK], ub[BLOCK];
    Squares sums = {0.0, 0.0};
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        const float* gf = load(g, o, gb, b);
        averages(gf, v + o, b, coefficient, rule);
        directions(gf, v + o, ub, b, coefficient, rule);
        sums.r += squares(ub, b);
        if (rule.scaled) sums.p += squares(load(p, o, pb, b), b);
    }
    return sums;
}

void adafactor_apply_run(
    const Parameter& p, Span g, Span m, const float* v, int64_t n, float coefficient, const Adafactor& rule) {
    float pb[BLOCK], gb[BLOCK], ub[BLOCK];
    for (int64_t o = 0; o < n; o += BLOCK) {
        const int b = n - o < BLOCK ? int(n - o) : BLOCK;
        float* pf = load(p, o, pb, b);
        directions(load(g, o, gb, b), v + o, ub, b, rule.step_size * coefficient, rule);
        if (m.data == nullptr) update(pf, ub, b, rule);
        else apply_momentum(pf, ub, m, o, b, rule);
        store(pf, p, o, b);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
