/*
Adafactor over lists of tensors; see launch.h, and rules/adafactor.h for the scheme.

Tensors are taken in groups (pipeline.h): every panel of a group is measured, then its statistics are finished, then
every panel is updated, the last first. For a group that the cache holds, the second pass reads memory no more, and 12
bytes an element move in fp32 (reads g, p; writes p); for a larger matrix 20.
*/
#include <memory>

#include "lists.h"
#include "pipeline.h"

namespace fastlm {

struct Piece {  // a panel of a matrix, or a run of a tensor that is not factored
    size_t tensor;
    int64_t matrix, row, rows;  // of a run: 0, its first element, its number of elements
    int64_t begin;              // first element in the tensor
    float *c, *w;               // column sums of a panel
    PanelSums sums;
    double u;                   // Σ U²
};

struct Lists {
    const Update& update;
    const Shapes& shapes;
    const Addresses &rows, &columns;
    const Tensors& m;
    const AdafactorOptions& options;
    const std::vector<float>& step;
    std::vector<Adafactor> rules;
};

// A group of tensors on their way through the passes.
class Work {
public:
    Work(Lists& lists, size_t begin, size_t end) : lists_(lists), begin_(begin), end_(end) {
        int64_t sums = 0, factors = 0;
        for (size_t t = begin; t < end; t++) {
            const auto [matrices, rows, columns] = lists.shapes[t];
            const int64_t height = columns == 0 ? CHUNK : std::min(MOST_ROWS, std::max(LEAST_ROWS, CHUNK / columns));
            for (int64_t b = 0; b < matrices; b++)
                for (int64_t i = 0; i < rows; i += height) {
                    const int64_t begin = (b * rows + i) * std::max<int64_t>(columns, 1);
                    pieces.push_back({t, b, i, std::min(height, rows - i), begin, nullptr, nullptr, {}, 0.0});
                    sums += 2 * columns;
                }
            first_factor_.push_back(factors);
            first_mean_.push_back(means_.size());
            factors += matrices * columns;
            means_.resize(means_.size() + matrices);
        }
        sums_.reset(new float[sums]);
        factors_.reset(new float[factors]);
        bound_.assign(end - begin, false);
        // every panel's column sums, Σ_i G² and Σ_i G²/R_i, one after another
        float* next = sums_.get();
        for (Piece& piece : pieces) {
            const int64_t columns = lists.shapes[piece.tensor][2];
            piece.c = next;
            piece.w = next + columns;
            next += 2 * columns;
        }
    }

    void measure(Piece& piece, float coefficient, const Kernels& k) {
        const Adafactor& rule = lists_.rules[piece.tensor];
        if (factored(piece)) {
            piece.sums = k.adafactor_measure(panel(piece), coefficient, rule);
        } else {
            const Squares s = k.adafactor_measure_run(param(piece),
                span(lists_.update.grads, piece.tensor, piece.begin), row_state(piece), piece.rows, coefficient, rule);
            piece.sums.p = s.p;
            piece.u = s.r;
        }
    }

    // Update the columns' averages from the panels' sums, in order, and find Σ U², or that it takes another pass.
    void finish_statistics() {
        std::vector<double> c, w;
        for (size_t i = 0; i < pieces.size();) {
            Piece& head = pieces[i];
            if (!factored(head)) {
                i++;
                continue;
            }
            const auto [matrices, rows, columns] = lists_.shapes[head.tensor];
            double R = 0.0, smallest_R = HUGE_VAL;
            // mean(R), and the column sums of all panels of this matrix
            c.assign(columns, 0.0);
            w.assign(columns, 0.0);
            for (; i < pieces.size() && pieces[i].tensor == head.tensor && pieces[i].matrix == head.matrix; i++) {
                const Piece& piece = pieces[i];
                R += piece.sums.R;
                smallest_R = std::min(smallest_R, piece.sums.smallest_R);
                for (int64_t j = 0; j < columns; j++) {
                    c[j] += piece.c[j];
                    w[j] += piece.w[j];
                }
            }
            const AdafactorOptions& o = lists_.options;
            const double mean = means_[first_mean_[head.tensor - begin_] + head.matrix] =
                mean_of_rows(R, double(rows), o);
            float* C = reinterpret_cast<float*>(lists_.columns[head.tensor]) + head.matrix * columns;
            float* b = factor(head);
            // C, 1/√C, and n m RMS(U)² = mean(R) Σ_j (Σ_i G²/R_i) / C_j
            double u = 0.0, smallest_C = HUGE_VAL;
            for (int64_t j = 0; j < columns; j++) {
                C[j] = ema(C[j], float(c[j] / double(rows)), lists_.rules[head.tensor]);
                b[j] = float(1.0 / std::sqrt(double(C[j])));
                if (c[j] == 0.0) continue;  // a column without gradient adds nothing to U
                u += w[j] / double(C[j]);
                smallest_C = std::min(smallest_C, double(C[j]));
            }
            head.u = mean * u;
            if (may_bind(smallest_R, smallest_C, mean, o)) bound_[head.tensor - begin_] = true;
        }
    }

    // The other pass, where it is needed.
    void measure_bounded(Piece& piece, float coefficient, const Kernels& k) {
        if (bound_[piece.tensor - begin_])
            piece.u = k.adafactor_bounded(panel(piece), coefficient, lists_.rules[piece.tensor]);
    }

    void finish_steps() {
        std::vector<Squares> sums(end_ - begin_, Squares{0.0, 0.0});
        for (const Piece& piece : pieces) {
            sums[piece.tensor - begin_].p += piece.sums.p;
            sums[piece.tensor - begin_].r += piece.u;
        }
        for (size_t t = begin_; t < end_; t++) {
            const auto [matrices, rows, columns] = lists_.shapes[t];
            const double n = double(matrices * rows * std::max<int64_t>(columns, 1));
            finish_adafactor(
                lists_.rules[t], lists_.step[t], sums[t - begin_].p, sums[t - begin_].r, n, lists_.options);
        }
    }

    void apply(const Piece& piece, float coefficient, const Kernels& k) {
        const Adafactor& rule = lists_.rules[piece.tensor];
        if (factored(piece)) k.adafactor_apply(panel(piece), coefficient, rule);
        else
            k.adafactor_apply_run(param(piece), span(lists_.update.grads, piece.tensor, piece.begin), momentum(piece),
                row_state(piece), piece.rows, coefficient, rule);
    }

    std::vector<Piece> pieces;

private:
    // of a panel: few column sums to keep, few terms in each
    static constexpr int64_t LEAST_ROWS = 64, MOST_ROWS = 512;

    bool factored(const Piece& piece) const { return lists_.shapes[piece.tensor][2] > 0; }
    Parameter param(const Piece& piece) const {
        return parameter(lists_.update, lists_.step[piece.tensor], piece.tensor, piece.begin);
    }
    Span momentum(const Piece& piece) const { return optional_span(lists_.m, piece.tensor, piece.begin); }
    float* factor(const Piece& piece) const {
        return factors_.get() + first_factor_[piece.tensor - begin_] + piece.matrix * lists_.shapes[piece.tensor][2];
    }
    float* row_state(const Piece& piece) const {
        return reinterpret_cast<float*>(lists_.rows[piece.tensor]) + piece.matrix * lists_.shapes[piece.tensor][1] +
               piece.row;
    }
    Panel panel(const Piece& piece) const {
        return {param(piece), span(lists_.update.grads, piece.tensor, piece.begin), momentum(piece), piece.rows,
            lists_.shapes[piece.tensor][2], row_state(piece), piece.c, piece.w, factor(piece),
            means_[first_mean_[piece.tensor - begin_] + piece.matrix]};
    }

    Lists& lists_;
    const size_t begin_, end_;
    std::unique_ptr<float[]> sums_, factors_;
    std::vector<int64_t> first_factor_;
    std::vector<size_t> first_mean_;
    std::vector<double> means_;
    std::vector<bool> bound_;
};

void launch_adafactor(const Update& update, const Shapes& shapes, const Addresses& rows, const Addresses& columns,
    const Tensors& m, const AdafactorOptions& options, int threads) {
    const Sizes sizes = sizes_of(shapes);
    check_update(update, sizes, {});
    check_factors(rows, columns, shapes, sizes);
    if (!m.empty()) check_list("exp_avgs", m, sizes);
    if (scalar(update.found_inf, 0.0f) != 0.0f) return;
    const std::vector<float> now = advance(update.steps);
    Lists lists{update, shapes, rows, columns, m, options, now, make_rules(now, options)};
    const float factor = scalar(update.coefficient, 1.0f);
    const Kernels& k = active();
    std::vector<Work> work;
    std::vector<int64_t> counts;
    for (const Group& group : groups(sizes)) {
        work.emplace_back(lists, group.begin, group.end);
        counts.push_back(int64_t(work.back().pieces.size()));
    }
    const auto run = [&](int pass, size_t group, int64_t i) {
        Work& w = work[group];
        if (pass == 0) w.measure(w.pieces[i], factor, k);
        else if (pass == 1) w.measure_bounded(w.pieces[i], factor, k);
        else
            // the last one read is the likeliest to be in the cache
            w.apply(w.pieces[counts[group] - 1 - i], factor, k);
    };
    const auto finish = [&](int pass, size_t group) {
        if (pass == 0) work[group].finish_statistics();
        if (pass == 1) work[group].finish_steps();
    };
    pipeline(3, counts, team(sizes, threads), run, finish);
}

}  // namespace fastlm
