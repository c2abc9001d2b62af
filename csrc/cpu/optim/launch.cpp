// AdamW, LAMB and SGD over lists of tensors; see launch.h.
#include "lists.h"
#include "pipeline.h"

namespace fastlm {

void launch_adamw(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, int threads) {
    check_update(update, sizes, {{"exp_avgs", &m}, {"exp_avg_sqs", &v}});
    if (scalar(update.found_inf, 0.0f) != 0.0f) return;
    const std::vector<float> now = advance(update.steps);
    const auto rules = make_rules(now, options);
    const float factor = scalar(update.coefficient, 1.0f);
    const std::vector<Chunk> chunks = cut(sizes);
    const Kernels& k = active();
    parallel_for(int64_t(chunks.size()), team(sizes, threads), [&](int64_t i) {
        const Chunk& c = chunks[i];
        k.adamw(parameter(update, now[c.tensor], c.tensor, c.begin), span(update.grads, c), span(m, c), span(v, c), c.n,
            factor, rules[c.tensor]);
    });
}

void launch_lamb(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, const RatioOptions& ratio, int threads) {
    check_update(update, sizes, {{"exp_avgs", &m}, {"exp_avg_sqs", &v}});
    if (scalar(update.found_inf, 0.0f) != 0.0f) return;
    const std::vector<float> now = advance(update.steps);
    auto rules = make_rules(now, options);
    const float factor = scalar(update.coefficient, 1.0f);
    const Kernels& k = active();
    // A group's chunks, and what each adds to the squares of its tensor: θ² and r².
    const std::vector<Group> all = groups(sizes);
    std::vector<std::vector<Chunk>> chunks;
    std::vector<std::vector<Squares>> partial;
    std::vector<int64_t> counts;
    for (const Group& group : all) {
        chunks.push_back(cut(sizes, group.begin, group.end));
        partial.emplace_back(chunks.back().size());
        counts.push_back(int64_t(chunks.back().size()));
    }
    // The first pass updates the moments and measures θ and r; the second, with the ratio known, moves θ.
    const auto run = [&](int pass, size_t group, int64_t piece) {
        // the last one read is the likeliest to be in the cache
        const int64_t i = pass == 0 ? piece : counts[group] - 1 - piece;
        const Chunk& c = chunks[group][i];
        const Parameter param = parameter(update, now[c.tensor], c.tensor, c.begin);
        if (pass == 0)
            partial[group][i] =
                k.lamb_moments(param, span(update.grads, c), span(m, c), span(v, c), c.n, factor, rules[c.tensor]);
        else k.lamb_apply(param, span(m, c), span(v, c), c.n, rules[c.tensor]);
    };
    // In between, each tensor's ratio from ‖θ‖ and ‖r‖, summed in the order of its chunks.
    const auto finish = [&](int pass, size_t group) {
        for (size_t i = 0; pass == 0 && i < chunks[group].size();) {
            const size_t t = chunks[group][i].tensor;
            Squares sums = {0.0, 0.0};
            for (; i < chunks[group].size() && chunks[group][i].tensor == t; i++) {
                sums.p += partial[group][i].p;
                sums.r += partial[group][i].r;
            }
            rules[t] = with_ratio(rules[t], sums.p, sums.r, double(sizes[t]), ratio);
        }
    };
    pipeline(2, counts, team(sizes, threads), run, finish);
}

void launch_sgd(
    const Update& update, const Sizes& sizes, const Tensors& buffers, const SgdOptions& options, int threads) {
    check_update(update, sizes, {});
    if (!buffers.empty()) check_list("buffers", buffers, sizes);
    if (scalar(update.found_inf, 0.0f) != 0.0f) return;
    const std::vector<float> now = advance(update.steps);
    const auto rules = make_rules(now, options);
    const float factor = scalar(update.coefficient, 1.0f);
    const std::vector<Chunk> chunks = cut(sizes);
    const Kernels& k = active();
    parallel_for(int64_t(chunks.size()), team(sizes, threads), [&](int64_t i) {
        const Chunk& c = chunks[i];
        k.sgd(parameter(update, now[c.tensor], c.tensor, c.begin), span(update.grads, c),
            optional_span(buffers, c.tensor, c.begin), c.n, factor, rules[c.tensor]);
    });
}

}  // namespace fastlm
