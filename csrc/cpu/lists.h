// What launchers over lists of tensors share: checks, chunks, and groups of tensors that a cache holds.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "launch.h"

namespace fastlm {

constexpr int64_t CHUNK = 262144;       // elements: long enough to hide the hand-over, short enough to share evenly
constexpr int64_t GROUP = 4 * CHUNK;    // elements: two passes over so many find the second time in the cache what they read the first

struct Chunk {
    size_t tensor;
    int64_t begin, n;
};

static inline void check(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

static inline void check_list(const char* name, const Tensors& list, const Sizes& sizes, int last_dtype = F16) {
    check(list.size() == sizes.size(), std::string(name) + " has " + std::to_string(list.size()) + " tensors for " + std::to_string(sizes.size()) + " sizes");
    for (size_t t = 0; t < list.size(); t++) {
        check(sizes[t] >= 0, "a size is negative");
        check(list[t].first != 0 || sizes[t] == 0, std::string(name) + " holds a null address");
        check(list[t].second >= F32 && list[t].second <= last_dtype, std::string(name) + " holds a dtype that is not fp32, bf16 or fp16");
    }
}

static inline void check_parameters(const Parameters& p, const Sizes& sizes) {
    check_list("params", p.stored, sizes);
    check(p.keys.empty() || p.keys.size() == sizes.size(), "keys and params differ in number");
    if (!p.companions.empty()) check_list("companions", p.companions, sizes, I16);
    for (size_t t = 0; t < sizes.size(); t++) {
        const int stored = p.stored[t].second;
        check(p.keys.empty() || (stored == BF16 && p.companions.empty()), "stochastic rounding is for bf16 parameters without companion");
        if (p.companions.empty()) continue;
        const int companion = p.companions[t].second;
        check(companion == F32 ? stored != F32 : companion == I16 && stored == BF16, "companions are fp32 of 16-bit parameters, or int16 of bf16");
    }
}

static inline void check_steps(const Addresses& steps, const Sizes& sizes) {
    check(steps.size() == sizes.size(), "steps and params differ in number");
    for (Address step : steps) check(step != 0, "steps holds a null address");
}

static inline float scalar(Address address, float otherwise) { return address ? *reinterpret_cast<const float*>(address) : otherwise; }

// Advance every step by one and return what they are now.
static inline std::vector<float> advance(const Addresses& steps) {
    std::vector<float> now;
    for (Address step : steps) now.push_back(*reinterpret_cast<float*>(step) += 1.0f);
    return now;
}

static inline std::vector<Chunk> cut(const Sizes& sizes, size_t begin, size_t end) {
    std::vector<Chunk> chunks;
    for (size_t t = begin; t < end; t++)
        for (int64_t o = 0; o < sizes[t]; o += CHUNK) chunks.push_back({t, o, std::min(CHUNK, sizes[t] - o)});
    return chunks;
}

static inline std::vector<Chunk> cut(const Sizes& sizes) { return cut(sizes, 0, sizes.size()); }

struct Group { size_t begin, end; };  // tensors begin … end - 1

// Runs of tensors that together reach GROUP elements; one large tensor is a group by itself.
static inline std::vector<Group> groups(const Sizes& sizes) {
    std::vector<Group> all;
    int64_t elements = 0;
    for (size_t t = 0; t < sizes.size(); t++) {
        if (all.empty() || elements + sizes[t] > GROUP) all.push_back({t, t}), elements = 0;
        all.back().end = t + 1;
        elements += sizes[t];
    }
    return all;
}

// As many threads as have WORTH elements each: waking another costs some ten microseconds, and much more on a busy machine.
static inline int team(const Sizes& sizes, int threads) {
    constexpr int64_t WORTH = 65536;
    int64_t elements = 0;
    for (int64_t size : sizes) elements += size;
    return int(std::min<int64_t>(threads, elements / WORTH + 1));
}

static inline Span span(const Tensors& list, size_t tensor, int64_t begin) {
    const auto [address, dtype] = list[tensor];
    return {reinterpret_cast<char*>(address) + begin * (dtype == F32 ? 4 : 2), dtype};
}

static inline Span span(const Tensors& list, const Chunk& c) { return span(list, c.tensor, c.begin); }

static inline Parameter parameter(const Parameters& p, float step, size_t tensor, int64_t begin) {
    const bool noisy = !p.keys.empty();
    return {span(p.stored, tensor, begin), p.companions.empty() ? Span{nullptr, F32} : span(p.companions, tensor, begin), noisy,
            noisy ? uint64_t(p.keys[tensor]) : 0, uint32_t(step), begin};
}

}  // namespace fastlm
