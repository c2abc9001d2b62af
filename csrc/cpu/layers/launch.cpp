// Launchers of the layers between matrix products; see launch.h. They check addresses and sizes, and hand rows to
// threads.
#include "../launch.h"

#include <algorithm>
#include <memory>

#include "../parallel.h"

namespace fastlm {

constexpr int64_t WORTH = 32768;    // elements that a thread takes at least
constexpr int64_t PARTIALS = 64;    // of a sum over rows, at most
constexpr int64_t PARTIAL_ROWS = 16;

// The tensor of this name; no data where it is not given.
static Span span(const Operands& tensors, const char* name, bool required) {
    const auto found = tensors.find(name);
    const std::string who = name;
    if (found == tensors.end()) {
        check(!required, who + " must be given");
        return {nullptr, F32};
    }
    const auto [address, dtype] = found->second;
    check(address != 0, who + " has a null address");
    check(dtype >= F32 && dtype <= F16, who + " has a dtype that is not fp32, bf16 or fp16");
    check(address % element_size(dtype) == 0, who + " has an address that is not a multiple of its element's size");
    return {reinterpret_cast<void*>(address), dtype};
}

// n elements of x in fp32, plus offset; of one that is not given, as many times `otherwise`.
static std::unique_ptr<float[]> vector_of(Span x, int64_t n, float offset, float otherwise) {
    std::unique_ptr<float[]> made(new float[n]);
    for (int64_t i = 0; i < n; i++)
        made[i] = !x.data          ? otherwise
                  : x.dtype == F32 ? static_cast<const float*>(x.data)[i] + offset
                  : x.dtype == F16 ? widen(static_cast<const f16*>(x.data)[i]) + offset
                                   : widen(static_cast<const bf16*>(x.data)[i]) + offset;
    return made;
}

// work(begin, end) for runs of rows that are worth a thread.
template <typename Work>
static void by_rows(int64_t rows, int64_t elements, int threads, const Work& work) {
    const int64_t together = std::max<int64_t>(1, WORTH / elements);
    parallel_for(ceil_div(rows, together), threads,
        [&](int64_t unit) { work(unit * together, std::min(rows, (unit + 1) * together)); });
}

static void check_rows(int64_t rows, int64_t D, Address statistics) {
    check(rows >= 0, "a size is negative");
    check(D >= 1 && D <= INT32_MAX, "rows must have 1 to 2³¹ - 1 elements");
    check(statistics || rows == 0, "statistics must be given");
}

void launch_norm(const Operands& tensors, Address statistics, bool centred, int64_t rows, int64_t D, double eps,
    double weight_offset, bool rounds_first, int threads) {
    check_rows(rows, D, statistics);
    if (rows == 0) return;
    Norm a = {};
    a.x = span(tensors, "x", true), a.residual = span(tensors, "residual", false), a.y = span(tensors, "y", true);
    a.s = span(tensors, "s", a.residual.data != nullptr);
    const auto weight = vector_of(span(tensors, "weight", false), D, float(weight_offset), 1.0f),
               bias = vector_of(span(tensors, "bias", false), D, 0.0f, 0.0f);
    a.weight = weight.get(), a.bias = bias.get();
    a.mean = centred ? reinterpret_cast<float*>(statistics) : nullptr;
    a.rstd = reinterpret_cast<float*>(statistics) + (centred ? rows : 0);
    a.D = D;
    a.eps = float(eps);
    a.rounds_first = rounds_first && a.y.dtype != F32;
    const int64_t together = std::max<int64_t>(1, WORTH / D);
    const Kernels& k = active();
    share(ceil_div(rows, together), 3 * D, threads, [&](int64_t unit, float* workspace) {
        k.norm(a, unit * together, std::min(rows, (unit + 1) * together), workspace);
    });
}

void launch_norm_backward(const Operands& tensors, Address statistics, bool centred, int64_t rows, int64_t D,
    double weight_offset, Address dweight, Address dbias, int threads) {
    check_rows(rows, D, statistics);
    NormBackward a = {};
    const int64_t together = std::max(PARTIAL_ROWS, ceil_div(rows, PARTIALS)), units = ceil_div(rows, together);
    std::unique_ptr<float[]> partials(new float[units * 2 * D]);
    const auto weight = vector_of(span(tensors, "weight", false), D, float(weight_offset), 1.0f);
    if (rows > 0) {
        a.dy = span(tensors, "dy", true), a.ds = span(tensors, "ds", false), a.s = span(tensors, "s", true);
        a.dx = span(tensors, "dx", true);
        a.weight = weight.get();
        a.mean = centred ? reinterpret_cast<const float*>(statistics) : nullptr;
        a.rstd = reinterpret_cast<const float*>(statistics) + (centred ? rows : 0);
        a.D = D;
        const Kernels& k = active();
        share(units, 4 * D, threads, [&](int64_t unit, float* workspace) {
            float* sums = partials.get() + unit * 2 * D;
            k.norm_backward(a, unit * together, std::min(rows, (unit + 1) * together), sums, sums + D, workspace);
        });
    }
    // rows are cut by their number alone, so that the sums' bits do not depend on threads
    for (int which = 0; which < 2; which++) {
        float* to = reinterpret_cast<float*>(which ? dbias : dweight);
        if (!to) continue;
        std::fill(to, to + D, 0.0f);
        for (int64_t unit = 0; unit < units; unit++)
            for (int64_t i = 0; i < D; i++) to[i] += partials[(2 * unit + which) * D + i];
    }
}

static Gate gate(const Operands& tensors, int64_t rows, int64_t H, int activation, bool gated, bool backward) {
    check(rows >= 0 && H >= 0, "a size is negative");
    check(activation >= GELU && activation <= TANH, "the activation's number is unknown");
    Gate a = {};
    a.x = span(tensors, "x", true), a.y = span(tensors, backward ? "dy" : "y", true);
    a.dx = span(tensors, "dx", backward);
    a.H = H;
    a.activation = activation;
    a.gated = gated;
    return a;
}

void launch_gate(const Operands& tensors, int64_t rows, int64_t H, int activation, bool gated, int threads) {
    if (rows == 0 || H == 0) return;
    const Gate a = gate(tensors, rows, H, activation, gated, false);
    by_rows(rows, H, threads, [&](int64_t begin, int64_t end) { active().gate(a, begin, end); });
}

void launch_gate_backward(const Operands& tensors, int64_t rows, int64_t H, int activation, bool gated, int threads) {
    if (rows == 0 || H == 0) return;
    const Gate a = gate(tensors, rows, H, activation, gated, true);
    by_rows(rows, H, threads, [&](int64_t begin, int64_t end) { active().gate_backward(a, begin, end); });
}

// The places of each token in their order, sorted by counting: those of a token are places[begins[token]] and on.
struct Sorted {
    std::vector<int64_t> begins, places;
    Sorted(const int64_t* ids, int64_t n, int64_t tokens, int64_t padding) : begins(tokens + 2), places(n) {
        int64_t* next = begins.data() + 1;  // of each token while places are handed out, then where the next one begins
        const auto counted = [&](int64_t i) { return ids[i] != padding; };
        for (int64_t i = 0; i < n; i++) {
            check(0 <= ids[i] && ids[i] < tokens,
                "an id is " + std::to_string(ids[i]) + "; give 0 to " + std::to_string(tokens - 1));
            if (counted(i)) next[ids[i] + 1]++;
        }
        for (int64_t token = 1; token <= tokens; token++) next[token] += next[token - 1];
        for (int64_t i = 0; i < n; i++)
            if (counted(i)) places[next[ids[i]]++] = i;
    }
};

void launch_embedding_backward(
    const Operands& tensors, Address ids, int64_t n, int64_t tokens, int64_t D, int64_t padding, int threads) {
    check(n >= 0 && tokens >= 0 && D >= 0, "a size is negative");
    check(D <= INT32_MAX, "rows must have at most 2³¹ - 1 elements");
    check(ids || n == 0, "ids must be given");
    if (tokens == 0 || D == 0) return;
    const Sorted sorted(reinterpret_cast<const int64_t*>(ids), n, tokens, padding);
    Embedding a = {};
    if (n > 0) a.dy = span(tensors, "dy", true);
    a.dweight = span(tensors, "dweight", true);
    a.begins = sorted.begins.data(), a.places = sorted.places.data();
    a.D = D;
    const int64_t together = std::max<int64_t>(1, WORTH / D);
    const Kernels& k = active();
    share(ceil_div(tokens, together), 5 * D, threads, [&](int64_t unit, float* workspace) {
        k.embedding_backward(a, unit * together, std::min(tokens, (unit + 1) * together), workspace);
    });
}

void launch_linear(const Operands& tensors, int64_t rows, int64_t K, int64_t N, int threads) {
    check(rows >= 0 && rows <= FEW_ROWS, "there must be at most " + std::to_string(FEW_ROWS) + " rows");
    check(K >= 0 && N >= 0, "a size is negative");
    if (rows == 0 || N == 0) return;
    Linear a = {};
    a.weight = span(tensors, "weight", K > 0), a.y = span(tensors, "y", true);
    const Span bias = span(tensors, "bias", false);
    const auto x = vector_of(span(tensors, "x", K > 0), rows * K, 0.0f, 0.0f), b = vector_of(bias, N, 0.0f, 0.0f);
    a.x = x.get(), a.bias = bias.data ? b.get() : nullptr;
    a.rows = rows, a.K = K, a.N = N;
    const Kernels& k = active();
    const auto unit = [&](int64_t i) { k.linear(a, i * FEW_OUTPUTS, std::min(N, (i + 1) * FEW_OUTPUTS)); };
    parallel_for(ceil_div(N, FEW_OUTPUTS), rows * K * N < WORTH ? 1 : threads, unit);
}

// Rows of logits, and what is done to each of them.
struct LogitRows {
    Logits c;
    char* x;
    int64_t rows, pitch;  // in bytes
    const int64_t* labels;

    LogitRows(
        const View& view, int dtype, Address bias, Address labels, int64_t words, const std::array<double, 3>& options)
        : labels(reinterpret_cast<const int64_t*>(labels)) {
        const auto& [address, shape, strides] = view;
        const auto [softcap, temperature, label_smoothing] = options;
        check(shape.size() == 2 && strides.size() == 2, "x must be [rows, V]");
        const int64_t V = shape[1];
        check(
            shape[0] >= 0 && V >= 1 && words >= V, "there must be at least one logit in a row, and no more than words");
        check(V == 1 || strides[1] == 1, "a row's logits must lie side by side");
        check(shape[0] <= 1 || strides[0] >= V, "rows must not overlap");
        check(dtype >= F32 && dtype <= F16, "x has a dtype that is not fp32, bf16 or fp16");
        check(shape[0] == 0 || (address && labels), "an address is null");
        check(temperature > 0 && softcap >= 0, "temperature must be positive, and softcap at least 0");
        c = {V, words, dtype, reinterpret_cast<const float*>(bias), float(softcap), float(temperature),
            float(label_smoothing)};
        x = reinterpret_cast<char*>(address), rows = shape[0], pitch = strides[0] * element_size(dtype);
    }

    // work(row, its logits, its label)
    template <typename Work>
    void each(int threads, const Work& work) const {
        parallel_for(rows, threads, [&](int64_t row) { work(row, x + row * pitch, labels[row]); });
    }
};

template <size_t N>
static std::array<float*, N> of_rows(const std::array<Address, N>& addresses, int64_t rows) {
    std::array<float*, N> made;
    for (size_t i = 0; i < N; i++) {
        check(rows == 0 || addresses[i], "an address is null");
        made[i] = reinterpret_cast<float*>(addresses[i]);
    }
    return made;
}

void launch_logits_measure(const View& x, int dtype, Address bias, Address labels, const std::array<Address, 2>& made,
    int64_t words, const std::array<double, 3>& options, int threads) {
    const LogitRows logits(x, dtype, bias, labels, words, options);
    const auto [lse, wanted] = of_rows(made, logits.rows);
    const Kernels& k = active();
    logits.each(threads, [&, lse = lse, wanted = wanted](int64_t row, void* x, int64_t label) {
        const RowLoss r = k.logits_measure(logits.c, x, label);
        lse[row] = r.lse, wanted[row] = r.wanted;
    });
}

void launch_logits_gradient(const View& x, int dtype, Address bias, Address labels, const std::array<Address, 3>& given,
    int64_t words, const std::array<double, 3>& options, int threads) {
    const LogitRows logits(x, dtype, bias, labels, words, options);
    const auto [lse, scale, g] = of_rows(given, logits.rows);
    const Kernels& k = active();
    logits.each(threads, [&, lse = lse, scale = scale, g = g](int64_t row, void* x, int64_t label) {
        k.logits_gradient(logits.c, x, label, lse[row], scale[row], g[row]);
    });
}

void launch_logits_lose(const View& x, int dtype, Address bias, Address labels, Address loss, int64_t words,
    const std::array<double, 3>& options, double z_loss, int threads) {
    const LogitRows logits(x, dtype, bias, labels, words, options);
    const auto [losses] = of_rows(std::array<Address, 1>{loss}, logits.rows);
    const float zeta = float(z_loss);
    const Kernels& k = active();
    logits.each(threads, [&, losses = losses](int64_t row, void* x, int64_t label) {
        const RowLoss r = k.logits_measure(logits.c, x, label);
        k.logits_gradient(logits.c, x, label, r.lse, 1.0f + 2.0f * zeta * r.lse, 1.0f);
        losses[row] = r.lse - r.wanted + zeta * r.lse * r.lse;
    });
}

}  // namespace fastlm
