// Share independent pieces of work among threads: OpenMP's, which are torch's own pool (one runtime per process), or,
// where the compiler has no OpenMP, threads started for the call. ThreadSanitizer sees those alone: GNU's OpenMP was
// not built for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace fastlm {

template <typename Work>
void parallel_for(int64_t n, int threads, const Work& work) {
    const int team = threads < n ? threads : int(n);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (int64_t i = 0; i < n; i++) work(i);
#else
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
    };
    std::vector<std::thread> others;
    for (int t = 1; t < team; t++) others.emplace_back(take);
    take();
    for (std::thread& other : others) other.join();
#endif
}

// work(unit, workspace) for every unit, begun in order. Each thread has `space` fp32 elements, at the start of a cache
// line.
template <typename Work>
void share(int64_t n, int64_t space, int threads, const Work& work) {
    const int64_t team = std::max<int64_t>(1, std::min<int64_t>(threads, n)), line = 16,
                  pitch = (space + line - 1) / line * line + line;
    std::unique_ptr<float[]> memory(new float[team * pitch + line]);
    float* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    std::atomic<int64_t> next{0};
    parallel_for(team, int(team), [&](int64_t member) {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < n;)
            work(unit, aligned + member * pitch);
    });
}

}  // namespace fastlm
