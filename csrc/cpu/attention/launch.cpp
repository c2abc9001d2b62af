// Launchers of attention; see launch.h. They check addresses, sizes and strides, prepare what all units share, and hand
// units to threads.
#include "term_arguments.h"

namespace fastlm {

static Attention attention(const View& q, const View& k, const View& v, int dtype, Address key_lengths,
    const Band& band, double scale, double softcap, Address out, Address lse) {
    const auto& q_shape = std::get<1>(q);
    const auto& k_shape = std::get<1>(k);
    check(q_shape.size() == 4 && k_shape.size() == 4, "q and k must have four dimensions");
    for (int64_t n : q_shape) check(n >= 0, "a size is negative");
    for (int64_t n : k_shape) check(n >= 0, "a size is negative");
    const int64_t B = q_shape[0], H = q_shape[1], Lq = q_shape[2], D = q_shape[3], Hk = k_shape[1], Lk = k_shape[2];
    check(D >= 1 && D <= MAX_D,
        "the head dimension is " + std::to_string(D) + "; served are 1 to " + std::to_string(MAX_D));
    check(Hk > 0 && H % Hk == 0, "query heads must be a multiple of key heads");
    check(dtype >= F32 && dtype <= F16, "the dtype must be fp32, bf16 or fp16");
    check(B * H * Lq == 0 || (out && lse), "out and lse must be given");
    const auto [left, right, offset] = band;
    check(left + right >= 0, "the band is empty: left + right must be at least 0");
    check(softcap == 0 || (softcap >= double(__FLT_MIN__) && softcap <= double(__FLT_MAX__)),
        "softcap is " + std::to_string(softcap) + "; give a positive number that fp32 holds, or 0 for none");
    const int64_t size = dtype == F32 ? 4 : 2;
    Attention a = {};
    a.q = rows("q", q, q_shape, size), a.k = rows("k", k, {B, Hk, Lk, D}, size),
    a.v = rows("v", v, {B, Hk, Lk, D}, size);
    a.dtype = dtype;
    a.B = B;
    a.H = H;
    a.Hk = Hk;
    a.Lq = Lq;
    a.Lk = Lk;
    a.D = int(D);
    a.diagonals_size = Lq + Lk - 1 + 2 * PAD;
    a.key_lengths = reinterpret_cast<const int64_t*>(key_lengths);
    a.left = left;
    a.right = right;
    a.offset = offset;
    a.scale = float(scale);
    a.softcap = float(softcap);
    a.out = reinterpret_cast<char*>(out);
    a.lse = reinterpret_cast<float*>(lse);
    return a;
}

// The table [H, Lq + Lk - 1] as diagonals, from the last to the first, with PAD zeros at both ends.
static std::unique_ptr<float[]> make_diagonals(Attention& a, Address table) {
    if (!table) return nullptr;
    std::unique_ptr<float[]> diagonals(new float[a.H * a.diagonals_size]());
    const int64_t n = a.Lq + a.Lk - 1;
    for (int64_t h = 0; h < a.H; h++) {
        const float* from = reinterpret_cast<const float*>(table) + h * n;
        float* row = diagonals.get() + h * a.diagonals_size + PAD;
        std::reverse_copy(from, from + n, row);
    }
    a.diagonals = diagonals.get();
    return diagonals;
}

void launch_attention(const View& q, const View& k, const View& v, int dtype, Address table, Address key_lengths,
    const TermViews& terms, const Dropout& dropout, const Band& band, double scale, double softcap, Address out,
    Address lse, int threads) {
    Attention a = attention(q, k, v, dtype, key_lengths, band, scale, softcap, out, lse);
    const TermArguments arguments(a, terms, dropout);
    if (a.B * a.H * a.Lq == 0) return;
    const auto diagonals = make_diagonals(a, table);
    const Kernels& kernels = active();
    share(units(a), forward_space(a.D) + terms_space(a), threads,
        [&](int64_t unit, float* space) { kernels.attention_forward(a, unit, space); });
}

// Keys outside every query's sight have zero gradients, which no unit writes.
static void clear_unseen(const AttentionBackward& x) {
    const Attention& a = x.forward;
    const int64_t row = a.D * (a.dtype == F32 ? 4 : 2);
    for (int64_t b = 0; b < a.B; b++) {
        const Range seen = keys_seen(a, b, {0, a.Lq});
        const int64_t begin = seen.empty() || a.Lq == 0 ? a.Lk : seen.begin / TILE * TILE,
                      end = seen.empty() ? a.Lk : seen.end;
        for (int64_t h = 0; h < a.Hk; h++)
            for (char* gradient : {x.dk, x.dv, x.terms.k_position}) {
                if (!gradient) continue;
                char* rows = gradient + (b * a.Hk + h) * a.Lk * row;
                std::fill(rows, rows + begin * row, 0);
                std::fill(rows + end * row, rows + a.Lk * row, 0);
            }
    }
}

void launch_attention_backward(const View& grad, Address grad_lse, const View& q, const View& k, const View& v,
    int dtype, Address table, Address key_lengths, const TermViews& terms, const Dropout& dropout, const Band& band,
    double scale, double softcap, Address out, Address lse, Address dq, Address dk, Address dv, Address dtable,
    const std::map<std::string, Address>& term_gradients, int threads) {
    AttentionBackward x = {};
    Attention& a = x.forward = attention(q, k, v, dtype, key_lengths, band, scale, softcap, out, lse);
    const TermArguments arguments(a, terms, dropout);
    TermSums term_sums(x, terms, term_gradients);
    x.grad_lse = reinterpret_cast<const float*>(grad_lse);
    x.grad = rows("grad", grad, std::get<1>(q), dtype == F32 ? 4 : 2);
    check((dq || a.B * a.H * a.Lq == 0) && ((dk && dv) || a.B * a.Hk * a.Lk == 0), "dq, dk and dv must be given");
    x.dq = reinterpret_cast<char*>(dq);
    x.dk = reinterpret_cast<char*>(dk);
    x.dv = reinterpret_cast<char*>(dv);
    clear_unseen(x);
    const auto diagonals = make_diagonals(a, table);
    const int64_t sums = a.B * a.Hk * a.Lk * pad_channels(a.D), n = a.Lq + a.Lk - 1;
    std::unique_ptr<float[]> dk_sum(new float[sums]), dv_sum(new float[sums]),
        ddiagonals(dtable ? new float[a.B * a.H * a.diagonals_size]() : nullptr);
    std::unique_ptr<int64_t[]> finished(new int64_t[a.B * a.Hk * ceil_div(a.Lk, TILE)]());
    x.dk_sum = dk_sum.get();
    x.dv_sum = dv_sum.get();
    x.ddiagonals = ddiagonals.get();
    x.finished = finished.get();
    const Kernels& kernels = active();
    share(units(a), backward_space(a) + terms_space(a), threads,
        [&](int64_t unit, float* space) { kernels.attention_backward(x, unit, space); });
    term_sums.finish(threads);
    if (!dtable) return;
    for (int64_t h = 0; h < a.H; h++) {
        float* to = reinterpret_cast<float*>(dtable) + h * n;
        for (int64_t d = 0; d < n; d++) {
            float sum = 0.0f;
            for (int64_t b = 0; b < a.B; b++) sum += x.ddiagonals[(b * a.H + h) * a.diagonals_size + PAD + n - 1 - d];
            to[d] = sum;
        }
    }
}

}  // namespace fastlm
