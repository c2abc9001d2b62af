/*
Several passes over groups of tensors, without a barrier between them.

Within a group, every piece of a pass is done before `finish` is called for that pass, once, and that before the first
piece of the next pass. A first few pieces of group k + 1, one for each thread, are handed out before group k's later
passes, so that a thread seldom waits for another: a barrier costs a time slice where processors are shared, and there
would be hundreds in a step. No more than a few, because group k is in the cache. Pieces are independent, and `finish`
adds in order, so results do not depend on who does what.
*/
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "../parallel.h"

namespace fastlm {

// pieces[k]: how many pieces group k has. run(pass, group, piece), finish(pass, group).
template <typename Run, typename Finish>
void pipeline(int passes, const std::vector<int64_t>& pieces, int threads, const Run& run, const Finish& finish) {
    const size_t groups = pieces.size();
    struct Task {
        int pass;
        size_t group;
        int64_t piece;
    };
    std::vector<Task> tasks;
    const auto add = [&](int pass, size_t group, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) tasks.push_back({pass, group, i});
    };
    const auto ahead = [&](size_t group) { return group < groups ? std::min<int64_t>(threads, pieces[group]) : 0; };
    for (size_t k = 0; k < groups; k++) {
        add(0, k, k > 0 ? ahead(k) : 0, pieces[k]);
        add(0, k + 1, 0, ahead(k + 1));
        for (int pass = 1; pass < passes; pass++) add(pass, k, 0, pieces[k]);
    }
    // 0: all pieces done; -1: finished too
    const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[passes * groups]);
    for (size_t i = 0; i < passes * groups; i++) left[i] = pieces[i % groups];
    std::atomic<size_t> next{0};
    parallel_for(threads, threads, [&](int64_t) {
        for (size_t i; (i = next.fetch_add(1)) < tasks.size();) {
            const Task& t = tasks[i];
            while (t.pass > 0 && left[(t.pass - 1) * groups + t.group].load(std::memory_order_acquire) != -1)
                std::this_thread::yield();
            run(t.pass, t.group, t.piece);
            std::atomic<int64_t>& mine = left[t.pass * groups + t.group];
            if (mine.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
            finish(t.pass, t.group);
            mine.store(-1, std::memory_order_release);
        }
    });
}

}  // namespace fastlm
