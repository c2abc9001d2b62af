// Share n independent pieces of work among threads. With OpenMP this is torch's own thread pool: one runtime per process.
#pragma once

#include <cstdint>

namespace fastlm {

template <typename Work>
void parallel_for(int64_t n, int threads, const Work& work) {
    const int team = threads < n ? threads : int(n);
    (void)team;
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (int64_t i = 0; i < n; i++) work(i);
}

}  // namespace fastlm
