// What launchers over lists of tensors share: steps and their rules, chunks, threads.
#pragma once

#include <algorithm>

#include "../launch.h"

namespace fastlm {

constexpr int64_t CHUNK = 262144;       // elements: long enough to hide the hand-over, short enough to share evenly

struct Chunk {
    size_t tensor;
    int64_t begin, n;
};

static inline float scalar(Address address, float otherwise) {
    return address ? *reinterpret_cast<const float*>(address) : otherwise;
}

// Advance every step by one and return what they are now.
static inline std::vector<float> advance(const Addresses& steps) {
    std::vector<float> now;
    for (Address step : steps) now.push_back(*reinterpret_cast<float*>(step) += 1.0f);
    return now;
}

// Each tensor's rule at its step.
template <typename Options>
auto make_rules(const std::vector<float>& steps, const Options& options) {
    std::vector<decltype(make_rule(1.0, options))> rules;
    for (float step : steps) rules.push_back(make_rule(step, options));
    return rules;
}

static inline std::vector<Chunk> cut(const Sizes& sizes, size_t begin, size_t end) {
    std::vector<Chunk> chunks;
    for (size_t t = begin; t < end; t++)
        for (int64_t o = 0; o < sizes[t]; o += CHUNK) chunks.push_back({t, o, std::min(CHUNK, sizes[t] - o)});
    return chunks;
}

static inline std::vector<Chunk> cut(const Sizes& sizes) { return cut(sizes, 0, sizes.size()); }

// Two passes over a group find the second time in the cache what they read the first.
static inline std::vector<Group> groups(const Sizes& sizes) { return groups(sizes, 4 * CHUNK, sizes.size()); }

// As many threads as have WORTH elements each: waking another costs some ten microseconds, and much more on a busy
// machine.
static inline int team(const Sizes& sizes, int threads) {
    constexpr int64_t WORTH = 65536;
    int64_t elements = 0;
    for (int64_t size : sizes) elements += size;
    return int(std::min<int64_t>(threads, elements / WORTH + 1));
}

static inline Span span(const Tensors& list, size_t tensor, int64_t begin) {
    const auto [address, dtype] = list[tensor];
    return {reinterpret_cast<char*>(address) + begin * element_size(dtype), dtype};
}

static inline Span span(const Tensors& list, const Chunk& c) { return span(list, c.tensor, c.begin); }

// The same of a list that may be empty.
static inline Span optional_span(const Tensors& list, size_t tensor, int64_t begin) {
    return list.empty() ? Span{nullptr, F32} : span(list, tensor, begin);
}

static inline Parameter parameter(const Update& update, float step, size_t tensor, int64_t begin) {
    const bool stochastic = !update.keys.empty();
    return {span(update.params, tensor, begin), optional_span(update.masters, tensor, begin), stochastic,
        stochastic ? uint64_t(update.keys[tensor]) : 0, uint32_t(step), begin};
}

}  // namespace fastlm
