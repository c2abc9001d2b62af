/*
Adafactor on panels: rows of a matrix that one thread takes whole. rules/adafactor.h has the scheme.

A panel is read in four quarters side by side, one row of each at a time: four long streams of each tensor, for memory
gives one stream, or short ones, half of what it gives several. The first pass reads four rows twice, the second time
from the first-level cache: once for the row sums, then, with R_i known, to add all four into the panel's column sums,
while the next four rows and the parameters come from memory. Sums of a row and of a column of a panel are fp32, of at
most STRIP or a few hundred terms; everything above is fp64.
*/
#include "parameter.h"
#include "squares.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int QUARTERS = 4, STRIP = 512;  // columns at a time

template <typename T, int N = QUARTERS>
struct Each {  // of the rows
    T of[N];

    T& operator[](int r) { return of[r]; }
    const T& operator[](int r) const { return of[r]; }
};
typedef Each<const float*> Four;

static inline float squared(float x) { return x * x; }

// What four rows x add to the columns, c and w; meanwhile Σ (coefficient next)² of each of the next four, and Σ θ² of
// the four rows of parameters. n ≤ STRIP. By value, so that pointers and factors stay in registers while vectors are
// stored.
static void add_rows(Four x, Each<float> inverse, Four next, Four theta, int n, float coefficient, float* __restrict c,
    float* __restrict w, Each<double>& of_next, double& of_theta) {
    constexpr int AHEAD = 128, EACH = LANES / W;
    V sums[QUARTERS][EACH] = {}, p_sums[EACH] = {};
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int r = 0; r < QUARTERS; r++) {
            __builtin_prefetch(next[r] + j + AHEAD);
            __builtin_prefetch(theta[r] + j + AHEAD);
        }
        for (int l = 0; l < EACH; l++) {
            const int o = j + l * W;
            V s[QUARTERS], p[QUARTERS];
            for (int r = 0; r < QUARTERS; r++) {
                const V a = load(x[r] + o) * coefficient, b = load(next[r] + o) * coefficient, d = load(theta[r] + o);
                s[r] = a * a;
                p[r] = d * d;
                sums[r][l] += b * b;
            }
            store(c + o, load(c + o) + ((s[0] + s[1]) + (s[2] + s[3])));
            store(w + o,
                load(w + o) + ((s[0] * inverse[0] + s[1] * inverse[1]) + (s[2] * inverse[2] + s[3] * inverse[3])));
            p_sums[l] += (p[0] + p[1]) + (p[2] + p[3]);
        }
    }
    float all[QUARTERS + 1][LANES];
    for (int l = 0; l < EACH; l++) {
        for (int r = 0; r < QUARTERS; r++) store(all[r] + l * W, sums[r][l]);
        store(all[QUARTERS] + l * W, p_sums[l]);
    }
    for (int l = 0; j < n; j++, l++) {
        float s[QUARTERS], p[QUARTERS];
        for (int r = 0; r < QUARTERS; r++) {
            s[r] = squared(coefficient * x[r][j]);
            p[r] = squared(theta[r][j]);
            all[r][l] += squared(coefficient * next[r][j]);
        }
        c[j] += (s[0] + s[1]) + (s[2] + s[3]);
        w[j] += (s[0] * inverse[0] + s[1] * inverse[1]) + (s[2] * inverse[2] + s[3] * inverse[3]);
        all[QUARTERS][l] += (p[0] + p[1]) + (p[2] + p[3]);
    }
    for (int r = 0; r < QUARTERS; r++) {
        const float sum = folded(all[r]);
        of_next[r] += in_range(sum) ? double(sum) : wide_squares(next[r], n, coefficient);
    }
    const float sum = folded(all[QUARTERS]);
    if (in_range(sum)) of_theta += double(sum);
    else
        for (int r = 0; r < QUARTERS; r++) of_theta += wide_squares(theta[r], n, 1.0f);
}

static void add_row(
    const float* __restrict x, float inverse, int n, float coefficient, float* __restrict c, float* __restrict w) {
    for (int j = 0; j < n; j++) {
        const float s = squared(coefficient * x[j]);
        c[j] += s;
        w[j] += s * inverse;
    }
}

// f(first column, columns) for all n
template <typename F>
static inline void in_strips(int64_t n, const F& f) {
    for (int64_t o = 0; o < n; o += STRIP) f(o, n - o < STRIP ? int(n - o) : STRIP);
}

static double row_squares(Span g, int64_t n, float coefficient) {
    float buffer[STRIP];
    double sum = 0.0;
    in_strips(n, [&](int64_t o, int b) { sum += squares(load(g, o, buffer, b), b, coefficient); });
    return sum;
}

// R ← β R + (1 - β)(mean_j G² + ε₁) of a row whose Σ_j G² is `squares`; returns 1/R, or 0 where the row has no
// gradient, which adds nothing to U whatever its average.
static float finish_row(float& R, double squares, int64_t n, const Adafactor& rule, PanelSums& sums) {
    R = ema(R, float(squares / double(n)), rule);
    sums.R += double(R);
    if (squares == 0.0) return 0.0f;
    if (double(R) < sums.smallest_R) sums.smallest_R = double(R);
    return 1.0f / R;
}

PanelSums adafactor_measure_panel(const Panel& panel, float coefficient, const Adafactor& rule) {
    const int64_t n = panel.columns, quarter = panel.rows / QUARTERS;
    float x_buffers[QUARTERS][STRIP], next_buffers[QUARTERS][STRIP], theta_buffers[QUARTERS][STRIP];
    for (int64_t j = 0; j < n; j++) panel.c[j] = panel.w[j] = 0.0f;
    PanelSums sums = {0.0, 0.0, double(HUGE_VALF)};
    Each<double> squares_of;
    for (int r = 0; quarter > 0 && r < QUARTERS; r++)
        squares_of[r] = row_squares(at(panel.g, r * quarter * n), n, coefficient);
    for (int64_t i = 0; i < quarter; i++) {
        Each<float> inverse;
        for (int r = 0; r < QUARTERS; r++) {
            inverse[r] = finish_row(panel.R[i + r * quarter], squares_of[r], n, rule, sums);
            squares_of[r] = 0.0;
        }
        const int64_t after = i + 1 < quarter ? i + 1 : i;  // of the last, what is measured is not used
        in_strips(n, [&](int64_t o, int b) {
            const auto row = [&](int64_t i, int r) { return (i + r * quarter) * n + o; };
            Four x, next, theta;
            for (int r = 0; r < QUARTERS; r++) {
                x[r] = load(panel.g, row(i, r), x_buffers[r], b);
                next[r] = load(panel.g, row(after, r), next_buffers[r], b);
                theta[r] = rule.scaled ? load(panel.p, row(i, r), theta_buffers[r], b) : x[r];
            }
            add_rows(x, inverse, next, theta, b, coefficient, panel.c + o, panel.w + o, squares_of, sums.p);
        });
    }
    for (int64_t i = quarter * QUARTERS; i < panel.rows; i++) {
        const float inverse = finish_row(panel.R[i], row_squares(at(panel.g, i * n), n, coefficient), n, rule, sums);
        in_strips(n, [&](int64_t o, int b) {
            const float* x = load(panel.g, i * n + o, x_buffers[0], b);
            add_row(x, inverse, b, coefficient, panel.c + o, panel.w + o);
            if (rule.scaled) sums.p += squares(load(panel.p, i * n + o, theta_buffers[0], b), b);
        });
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

// Of a row, or of four side by side.
template <int ROWS>
static void update(Each<float*, ROWS> p, Each<float*, ROWS> g, const float* b, int n, Each<float, ROWS> a, float s,
    const Adafactor& rule) {
    const Adafactor c = rule;
    const V bound = broadcast(c.bound);
    int j = 0;
    for (; j + W <= n; j += W) {
        const V of_column = load(b + j);
        for (int r = 0; r < ROWS; r++) {
            const V rate = a[r] * of_column;
            store(p[r] + j, load(p[r] + j) * c.decay - s * load(g[r] + j) * (rate > bound ? bound : rate));
        }
    }
    for (; j < n; j++)
        for (int r = 0; r < ROWS; r++) p[r][j] = p[r][j] * c.decay - s * g[r][j] * factored_rate(a[r], b[j], c);
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

// rows i, i + apart, …
template <int ROWS>
static void apply_rows(const Panel& panel, int64_t i, int64_t apart, float s, const Adafactor& rule) {
    float p_buffers[ROWS][STRIP], g_buffers[ROWS][STRIP], u[STRIP];
    Each<float, ROWS> a;
    for (int r = 0; r < ROWS; r++) a[r] = row_factor(panel, i + r * apart);
    in_strips(panel.columns, [&](int64_t j, int n) {
        const auto at = [&](int r) { return (i + r * apart) * panel.columns + j; };
        Each<float*, ROWS> p, g;
        for (int r = 0; r < ROWS; r++) {
            p[r] = load(panel.p, at(r), p_buffers[r], n);
            g[r] = load(panel.g, at(r), g_buffers[r], n);
        }
        if (panel.m.data == nullptr) update<ROWS>(p, g, panel.b + j, n, a, s, rule);
        for (int r = 0; r < ROWS; r++) {
            if (panel.m.data != nullptr) {
                directions(g[r], panel.b + j, u, n, a[r], s, rule);
                apply_momentum(p[r], u, panel.m, at(r), n, rule);
            }
            store(p[r], panel.p, at(r), n);
        }
    });
}

void adafactor_apply_panel(const Panel& panel, float coefficient, const Adafactor& rule) {
    const int64_t quarter = panel.rows / QUARTERS;
    const float s = rule.step_size * coefficient;
    for (int64_t i = 0; i < quarter; i++) apply_rows<QUARTERS>(panel, i, quarter, s, rule);
    for (int64_t i = quarter * QUARTERS; i < panel.rows; i++) apply_rows<1>(panel, i, 0, s, rule);
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
