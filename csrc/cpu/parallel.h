// Share n independent pieces of work among threads: OpenMP's, which are torch's own pool (one runtime per process), or,
// where the compiler has no OpenMP, threads started for the call. ThreadSanitizer sees those alone: GNU's OpenMP was
// not built for it.
#pragma once

#include <cstdint>

#if !defined(_OPENMP)
#include <atomic>
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

}  // namespace fastlm
