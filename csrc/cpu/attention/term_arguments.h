// From the terms that Python gives attention by name to the Terms that kernels read, and from their sums to the
// gradients: the launcher's part.
#pragma once

#include <algorithm>
#include <map>
#include <memory>

#include "../launch.h"
#include "../parallel.h"

namespace fastlm {

static inline int64_t bytes_of(int dtype) { return dtype == F32 ? 4 : 2; }

// n elements, `step` bytes apart, as fp32.
static inline void widen_run(const char* x, int64_t step, int dtype, int64_t n, float* out) {
    const auto run = [&](const auto* first) {
        for (int64_t i = 0; i < n; i++) out[i] = widen(*reinterpret_cast<decltype(first)>(x + i * step));
    };
    if (dtype == BF16) run(static_cast<const bf16*>(nullptr));
    else if (dtype == F16) run(static_cast<const f16*>(nullptr));
    else run(static_cast<const float*>(nullptr));
}

// The way back, densely, times scale.
static inline void narrow_run(const float* x, int64_t n, float scale, int dtype, char* out) {
    const auto run = [&](auto* to) {
        for (int64_t i = 0; i < n; i++) narrow(scale * x[i], to[i]);
    };
    if (dtype == BF16) run(reinterpret_cast<bf16*>(out));
    else if (dtype == F16) run(reinterpret_cast<f16*>(out));
    else run(reinterpret_cast<float*>(out));
}

// The last dimension's stride must be 1: kernels read channels side by side.
static Rows rows(const char* name, const View& view, const std::vector<int64_t>& shape, int64_t size) {
    const auto& [address, got, strides] = view;
    check(got == shape && strides.size() == 4, std::string(name) + " does not have the shape that q and k imply");
    const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    check(empty || address != 0, std::string(name) + " is a null address");
    check(empty || shape[3] == 1 || strides[3] == 1,
        std::string(name) + " must have its channels side by side: the last stride is " + std::to_string(strides[3]));
    return {reinterpret_cast<char*>(address), strides[0] * size, strides[1] * size, strides[2] * size};
}

class TermArguments {  // owns what Terms point to beside Python's tensors
public:
    TermArguments(Attention& a, const TermViews& views, const Dropout& dropout) : a(a), views(views) {
        const auto [probability, threshold, seed, first_query, first_key] = dropout;
        check(probability >= 0 && probability < 1,
            "dropout is " + std::to_string(probability) + "; give 0 ≤ dropout < 1");
        if (views.empty() && probability == 0) return;
        terms.prefix = dense<int64_t>("prefix", {a.B});
        terms.q_segments = dense<int64_t>("q_segments", {a.B, a.Lq}),
        terms.k_segments = dense<int64_t>("k_segments", {a.B, a.Lk});
        terms.q_ranks = dense<int64_t>("q_ranks", {a.B, a.Lq}), terms.k_ranks = dense<int64_t>("k_ranks", {a.B, a.Lk});
        terms.q_groups = dense<int64_t>("q_groups", {a.B, a.Lq}),
        terms.k_groups = dense<int64_t>("k_groups", {a.B, a.Lk});
        terms.same = dense<float>("same", {a.B, a.H, a.Lq});
        for (const char* pair : {"segments", "ranks", "groups"})
            check(views.count(std::string("q_") + pair) == views.count(std::string("k_") + pair),
                std::string(pair) + " must be given for queries and keys");
        check(views.count("same") == views.count("q_groups"), "same goes with groups of queries and keys");
        take_bias();
        const int64_t size = bytes_of(a.dtype);
        if (has("q_position"))
            terms.q_position = rows("q_position", views.at("q_position").first, {a.B, a.H, a.Lq, a.D}, size);
        if (has("k_position"))
            terms.k_position = rows("k_position", views.at("k_position").first, {a.B, a.Hk, a.Lk, a.D}, size);
        if (has("query_vectors") || has("key_vectors") || has("value_vectors")) take_buckets();
        terms.query_vectors = vectors("query_vectors", 0);
        terms.key_vectors = vectors("key_vectors", 1);
        terms.value_vectors = vectors("value_vectors", 2);
        terms.threshold = threshold;
        terms.seed = seed;
        terms.first_query = first_query;
        terms.first_key = first_key;
        terms.kept_scale = float(1 / (1 - probability));
        a.terms = &terms;
    }
    TermArguments(const TermArguments&) = delete;

    bool has(const char* name) const { return views.count(name) != 0; }

private:
    template <typename T>
    const T* dense(const char* name, std::vector<int64_t> shape) const {
        if (!has(name)) return nullptr;
        const auto& [address, got, strides] = views.at(name).first;
        check(got == shape, std::string(name) + " does not have the shape that q and k imply");
        return reinterpret_cast<const T*>(address);
    }

    void take_bias() {
        if (!has("bias")) return;
        const auto& [view, dtype] = views.at("bias");
        const auto& [address, shape, strides] = view;
        const int64_t full[] = {a.B, a.H, a.Lq, a.Lk}, size = bytes_of(dtype);
        check(shape.size() == 4 && strides.size() == 4 && dtype >= F32 && dtype <= F16,
            "bias must have four dimensions and be fp32, bf16 or fp16");
        int64_t steps[4];
        for (int i = 0; i < 4; i++) {
            check(shape[i] == 1 || shape[i] == full[i], "bias does not broadcast to [B, H, Lq, Lk]");
            steps[i] = shape[i] == 1 ? 0 : strides[i] * size;
        }
        terms.bias = {reinterpret_cast<char*>(address), steps[0], steps[1], steps[2]};
        terms.bias_column = steps[3];
        terms.bias_dtype = dtype;
    }

    // Which of the vectors each distance has: its own, or the one that `buckets` says.
    void take_buckets() {
        const int64_t n = a.Lq + a.Lk - 1;
        const int64_t* given = dense<int64_t>("buckets", {n});
        bucket.reset(new int32_t[vector_rows(a)]);
        for (int64_t d = 0; d < n; d++) {
            const int64_t rise = given ? given[d] - (d ? given[d - 1] : 0) : d > 0;
            check(rise == 0 || (rise == 1 && d > 0), "buckets must begin with 0 and rise by 0 or 1");
            bucket[PAD + d] = int32_t(given ? given[d] : d);
        }
        const int32_t last = n > 0 ? bucket[PAD + n - 1] : -1;
        std::fill_n(bucket.get(), PAD, 0);
        std::fill_n(bucket.get() + PAD + n, PAD, last);
        terms.bucket = bucket.get();
        terms.buckets = last + 1;
    }

    const float* vectors(const char* name, int which) {
        if (!has(name)) return nullptr;
        const auto& [view, dtype] = views.at(name);
        const auto& [address, shape, strides] = view;
        const int64_t n = terms.buckets, size = bytes_of(dtype), padded = pad_channels(a.D);
        check(shape == std::vector<int64_t>({a.H, n, a.D}) && dtype >= F32 && dtype <= F16,
            std::string(name) + " must be [H, Lq + Lk - 1, D], or [H, buckets, D], fp32, bf16 or fp16");
        copies[which].reset(new float[a.H * n * padded]());
        for (int64_t h = 0; h < a.H; h++)
            for (int64_t r = 0; r < n; r++)
                widen_run(reinterpret_cast<const char*>(address) + (h * strides[0] + r * strides[1]) * size,
                    strides[2] * size, dtype, a.D, copies[which].get() + (h * n + r) * padded);
        return copies[which].get();
    }

    Attention& a;
    const TermViews& views;
    Terms terms = {};
    std::unique_ptr<float[]> copies[3];
    std::unique_ptr<int32_t[]> bucket;
};

class TermSums {  // sums that kernels add to, and the way from them to the gradients at the addresses wanted
public:
    TermSums(AttentionBackward& x, const TermViews& views, const std::map<std::string, Address>& addresses)
        : x(x), views(views), addresses(addresses) {
        const Attention& a = x.forward;
        for (const auto& [name, address] : addresses)
            check(views.count(name), "the gradient of " + name + " is wanted, which is not given");
        const int64_t vectors = a.H * vector_rows(a) * pad_channels(a.D);
        if (addresses.count("bias")) want_bias();
        if (addresses.count("query_vectors")) x.terms.query_vectors = sums[1] = zeros(vectors);
        if (addresses.count("key_vectors")) x.terms.key_vectors = sums[2] = zeros(vectors);
        if (addresses.count("value_vectors")) x.terms.value_vectors = sums[3] = zeros(vectors);
        x.terms.same = reinterpret_cast<float*>(at("same"));
        x.terms.q_position = at("q_position");
        x.terms.k_position = at("k_position");
        if (views.count("k_position") && a.terms->key_vectors)
            x.terms.k_position_sum = sums[4] = zeros(a.B * a.Hk * a.Lk * pad_channels(a.D));
        if (x.terms.bias_sum.data || sums[1] || sums[2] || sums[3]) x.progress = progress = new int64_t[units(a)]();
    }
    TermSums(const TermSums&) = delete;
    ~TermSums() {
        for (float* sum : sums) delete[] sum;
        delete[] progress;
    }

    // Once all units are done. Sums over rows of the batch, heads, queries run in their order.
    void finish(int threads) const {
        if (x.terms.bias_sum.data && sums[0]) narrow_bias();
        if (x.terms.bias_of_queries || x.terms.bias_of_keys) finish_bias();
        const char* names[] = {"", "query_vectors", "key_vectors", "value_vectors"};
        const Attention& a = x.forward;
        const float scales[] = {0.0f, a.scale, a.scale, a.terms ? a.terms->kept_scale : 1.0f};
        for (int which = 1; which < 4; which++)
            if (sums[which]) finish_vectors(names[which], sums[which], scales[which], threads);
    }

private:
    static float* zeros(int64_t n) { return new float[n](); }

    char* at(const char* name) const {
        return addresses.count(name) ? reinterpret_cast<char*>(addresses.at(name)) : nullptr;
    }

    // Straight into the gradient where each pair has its element, or the sum is in its dtype; else into an fp32 tensor
    // of its shape.
    void want_bias() {
        const Attention& a = x.forward;
        const auto& [view, dtype] = views.at("bias");
        const auto& shape = std::get<1>(view);
        if (shape[3] == 1) {
            x.terms.bias_of_queries = sums[0] = zeros(a.B * a.H * a.Lq);
            return;
        }
        if (shape[2] == 1) {
            x.terms.bias_of_keys = sums[0] = zeros(a.B * a.H * a.Lk);
            return;
        }
        const bool shared = shape[0] < a.B || shape[1] < a.H;
        const int64_t size = shared ? 4 : bytes_of(dtype), row = a.Lk * size, head = a.Lq * row;
        if (shared && dtype != F32) sums[0] = zeros(shape[0] * shape[1] * a.Lq * a.Lk);
        char* data = sums[0] ? reinterpret_cast<char*>(sums[0]) : at("bias");
        (shared ? x.terms.bias_sum : x.terms.bias_own) = {
            data, shape[0] < a.B ? 0 : shape[1] * head, shape[1] < a.H ? 0 : head, row};
    }

    void narrow_bias() const {
        const auto& [view, dtype] = views.at("bias");
        const auto& shape = std::get<1>(view);
        narrow_run(sums[0], shape[0] * shape[1] * shape[2] * shape[3], 1.0f, dtype, at("bias"));
    }

    void finish_bias() const {
        const Attention& a = x.forward;
        const auto& [view, dtype] = views.at("bias");
        const auto& shape = std::get<1>(view);
        const int64_t n = x.terms.bias_of_keys ? a.Lk : a.Lq, kept = x.terms.bias_of_keys ? shape[3] : shape[2];
        std::unique_ptr<double[]> total(new double[shape[0] * shape[1] * kept]());
        for (int64_t b = 0; b < a.B; b++)
            for (int64_t h = 0; h < a.H; h++) {
                double* to = total.get() + ((shape[0] == 1 ? 0 : b) * shape[1] + (shape[1] == 1 ? 0 : h)) * kept;
                for (int64_t e = 0; e < n; e++) to[kept == 1 ? 0 : e] += sums[0][(b * a.H + h) * n + e];
            }
        const std::vector<float> rounded(total.get(), total.get() + shape[0] * shape[1] * kept);
        narrow_run(rounded.data(), shape[0] * shape[1] * kept, 1.0f, dtype, at("bias"));
    }

    void finish_vectors(const char* name, const float* sum, float scale, int threads) const {
        const Attention& a = x.forward;
        const int64_t n = a.Lq + a.Lk - 1, padded = pad_channels(a.D), buckets = a.terms->buckets;
        const int32_t* bucket = a.terms->bucket + PAD;
        const int dtype = views.at(name).second;
        parallel_for(a.H, threads, [&](int64_t h) {
            std::vector<double> total(padded);
            for (int64_t d = 0; d < n; d++) {
                const float* from = sum + (h * vector_rows(a) + PAD + d) * padded;
                const bool begins = d == 0 || bucket[d] > bucket[d - 1];
                for (int64_t e = 0; e < padded; e++) total[e] = begins ? from[e] : total[e] + from[e];
                if (d + 1 < n && bucket[d + 1] == bucket[d]) continue;
                const std::vector<float> rounded(total.begin(), total.end());
                narrow_run(
                    rounded.data(), a.D, scale, dtype, at(name) + (h * buckets + bucket[d]) * a.D * bytes_of(dtype));
            }
        });
    }

    AttentionBackward& x;
    const TermViews& views;
    const std::map<std::string, Address>& addresses;
    float* sums[5] = {};
    int64_t* progress = nullptr;
};

}  // namespace fastlm
