// Runs csrc/cuda/panels.h and adafactor.h, Adafactor on a GPU, on the host under sanitizers: blocks in any order, their
// threads one after another between barriers. Prints the first failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "../../csrc/cuda/adafactor.h"

using namespace fastlm;

#define REQUIRE(x) \
    if (!(x)) std::printf("panels.cpp:%d: %s does not hold\n", __LINE__, #x), std::exit(1)

// ---------------------------------------------------------------------------------------------------------------------
// Geometry

static void pieces_cover_everything_once(const Shapes& shapes, const Group& group) {
    const size_t n = group.end - group.begin;
    const Tensors none(shapes.size());
    const Addresses zeros(shapes.size());
    const Update update{none, {}, {}, none, {}, 0, 0};
    const auto items = std::make_unique<Items>();
    describe({update, shapes, zeros, zeros, none}, group, nullptr, *items);
    const Counts counts = counts_of(shapes, group);
    REQUIRE(n <= size_t(Items::CAPACITY) && items->tensors == int64_t(n));
    const Item& end = items->item[n];
    REQUIRE(end.panels == counts.panels && end.strips == counts.strips && end.chunks == counts.chunks);
    std::vector<int64_t> rows(n), done(n), columns(n);  // of each tensor so far
    for (uint32_t i = 0; i < counts.panels; i++) {
        const Panel panel = panel_at(*items, i);
        const Item& x = items->item[panel.item];
        REQUIRE(panel.begin == rows[panel.item] * at_least(x.columns, 1) && panel.n > 0 && panel.rows <= MOST_ROWS);
        if (x.columns > 0)
            REQUIRE(panel.row == rows[panel.item] && panel.row / x.rows == (panel.row + panel.rows - 1) / x.rows);
        rows[panel.item] += x.columns > 0 ? panel.rows : panel.n;
    }
    for (uint32_t i = 0; i < counts.strips; i++) {
        const Strip strip = strip_at(*items, i);
        const Item& x = items->item[strip.item];
        REQUIRE(int64_t(strip.matrix) * x.columns + strip.first == columns[strip.item] && strip.n > 0);
        const Panel first = panel_at(*items, strip.panel), last = panel_at(*items, strip.panel + strip.panels - 1);
        REQUIRE(first.row == strip.matrix * x.rows && last.row + last.rows == (strip.matrix + 1) * x.rows);
        columns[strip.item] += strip.n;
    }
    for (uint32_t i = 0; i < counts.chunks; i++) {
        const Piece piece = piece_at(*items, i);
        REQUIRE(piece.begin == done[piece.item] && piece.n > 0);
        done[piece.item] += piece.n;
    }
    for (size_t t = 0; t < n; t++) {
        const Item& x = items->item[t];
        REQUIRE(rows[t] == int64_t(x.matrices) * x.rows && done[t] == elements(x) &&
                columns[t] == (x.rows > 0 ? int64_t(x.matrices) * x.columns : 0));
    }
}

static void geometry() {
    std::mt19937 random(0);
    std::vector<Shapes> all = {{}, {{1, 0, 0}}, {{1, 1, 1}}, {{0, 5, 3}, {1, 7, 0}, {2, 64, 33}, {1, 0, 4}},
        {{1, 50257, 768}}, {{1, 3, 50257}}, {{4096, 3, 3}}, {{1, int64_t(1) << 32, 0}}, {{1, 2, WIDEST}}};
    for (int trial = 0; trial < 30; trial++) {
        Shapes shapes(random() % 1000);
        for (auto& [matrices, rows, columns] : shapes) {
            matrices = random() % 3;
            rows = random() % 200;
            columns = random() % 4 ? random() % 300 : 0;
        }
        all.push_back(shapes);
    }
    for (const Shapes& shapes : all) {
        size_t next = 0;
        for (const Group& group : groups(sizes_of(shapes), TOGETHER, Items::CAPACITY)) {
            REQUIRE(group.begin == next && group.end > next);
            next = group.end;
            pieces_cover_everything_once(shapes, group);
        }
        REQUIRE(next == shapes.size());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The update

struct Matrix {  // one tensor and its state; reading or writing past the end is an error that the sanitizer sees
    Matrix(std::array<int64_t, 3> shape, int p_dtype, int g_dtype, int m_dtype, int shift, float size,
        std::mt19937& random)
        : shape(shape), n(sizes_of({shape})[0]), p(n, p_dtype, 0), g(n, g_dtype, shift), m(n, m_dtype, 0) {
        const auto [matrices, rows, columns] = shape;
        R.resize(matrices * rows);
        C.resize(matrices * columns);
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < n; i++) {
            p.set(i, normal(random));
            g.set(i, size * normal(random));
            m.set(i, 0.01f * normal(random));
        }
        for (float& x : R) x = size * size * (1 + std::fabs(normal(random)));
        for (float& x : C) x = size * size * (1 + std::fabs(normal(random)));
    }
    struct Data {
        Data(int64_t n, int dtype, int shift)
            : memory(new char[(n + shift) * element_size(dtype)]),
              data(memory.get() + shift * element_size(dtype)),
              dtype(dtype) {}
        float get(int64_t i) const {
            return dtype == F32 ? reinterpret_cast<float*>(data)[i] : widen(reinterpret_cast<bf16*>(data)[i]);
        }
        void set(int64_t i, float x) {
            if (dtype == F32) reinterpret_cast<float*>(data)[i] = x;
            else narrow(x, reinterpret_cast<bf16*>(data)[i]);
        }
        std::pair<Address, int> tensor() const { return {reinterpret_cast<Address>(data), dtype}; }
        std::unique_ptr<char[]> memory;
        char* data;
        int dtype;
    };
    std::array<int64_t, 3> shape;
    int64_t n;
    Data p, g, m;
    std::vector<float> R, C;
};

struct Expected {
    std::vector<double> p, m, R, C;
};

// The formulas at the head of rules/adafactor.h, in fp64.
static Expected expected(const Matrix& x, double step, double coefficient, bool momentum, const AdafactorOptions& o) {
    const auto [matrices, rows, columns] = x.shape;
    const Adafactor c = make_rule(step, o);
    Expected e{{}, {}, {x.R.begin(), x.R.end()}, {x.C.begin(), x.C.end()}};
    std::vector<double> u(x.n);
    const auto G = [&](int64_t i) { return coefficient * x.g.get(i); };
    const auto average = [&](double& old, double square) {
        old = c.beta2 * old + c.one_beta2 * (square + o.eps_square);
    };
    double bound = o.eps_bound > 0 ? 1 / o.eps_bound : HUGE_VAL, u_squares = 0, p_squares = 0;
    for (int64_t b = 0; b < matrices && columns > 0; b++) {
        double mean = 0;
        for (int64_t i = b * rows; i < (b + 1) * rows; i++) {
            double sum = 0;
            for (int64_t j = 0; j < columns; j++) sum += G(i * columns + j) * G(i * columns + j);
            average(e.R[i], sum / columns), mean += e.R[i] / rows;
        }
        mean = std::fmax(mean, o.eps_bound);
        for (int64_t j = 0; j < columns; j++) {
            double sum = 0;
            for (int64_t i = b * rows; i < (b + 1) * rows; i++) sum += G(i * columns + j) * G(i * columns + j);
            average(e.C[b * columns + j], sum / rows);
        }
        for (int64_t i = b * rows; i < (b + 1) * rows; i++)
            for (int64_t j = 0; j < columns; j++)
                u[i * columns + j] =
                    G(i * columns + j) * std::fmin(bound, std::sqrt(mean / e.R[i] / e.C[b * columns + j]));
    }
    for (int64_t i = 0; i < x.n; i++) {
        if (columns == 0) average(e.R[i], G(i) * G(i)), u[i] = G(i) * std::fmin(bound, 1 / std::sqrt(e.R[i]));
        u_squares += u[i] * u[i];
        p_squares += double(x.p.get(i)) * x.p.get(i);
    }
    Adafactor finished = c;
    finish_adafactor(finished, step, p_squares, u_squares, double(x.n), o);
    for (int64_t i = 0; i < x.n; i++) {
        e.m.push_back(c.beta1 * double(x.m.get(i)) + c.one_beta1 * finished.step_size * u[i]);
        e.p.push_back(finished.decay * double(x.p.get(i)) - (momentum ? e.m[i] : finished.step_size * u[i]));
    }
    return e;
}

template <typename F>
static double sum_of_threads(const F& f) {
    double sum = 0;
    for (int thread = 0; thread < THREADS; thread++) sum += f(thread);
    return sum;
}

// What the kernels of adafactor.cu do, one block after another.
template <bool MOMENTUM>
static void step(const Items& items, const Counts& counts, std::vector<Now<Adafactor>>& now, float coefficient,
    const AdafactorOptions& o) {
    std::vector<PanelSums> panels(counts.panels);
    for (uint32_t index = 0; index < counts.panels; index++) {
        const Panel panel = panel_at(items, index);
        const Item& x = items.item[panel.item];
        const Adafactor& c = now[panel.item].rule;
        PanelSums& sums = panels[index];
        std::vector<float> inverse(panel.rows);
        if (x.columns == 0) {
            sums.u = sum_of_threads([&](int thread) { return average_squares(x, panel, coefficient, c, thread); });
        } else {
            for (int r = 0; r < panel.rows; r++) {
                double sum = 0;
                for (int lane = 0; lane < WARP; lane++) sum += row_squares(x, panel, r, coefficient, lane);
                inverse[r] = finish_row(x, panel, r, sum, c);
            }
            for (int thread = 0; thread < THREADS; thread++) column_sums(x, panel, inverse.data(), coefficient, thread);
            sum_rows(x, panel, inverse.data(), sums);
        }
        sums.p = sum_of_threads([&](int thread) { return parameter_squares<OWN>(x, panel, thread); });
    }
    std::vector<StripSums> strips(counts.strips);
    for (uint32_t index = 0; index < counts.strips; index++) {
        const Strip strip = strip_at(items, index);
        const Item& x = items.item[strip.item];
        double R = 0, smallest_R = HUGE_VAL, smallest_C = HUGE_VAL, total = 0;
        for (uint32_t q = strip.panel; q < strip.panel + strip.panels; q++) {
            R += panels[q].R;
            smallest_R = std::fmin(smallest_R, panels[q].smallest_R);
        }
        const double mean = mean_of_rows(R, double(x.rows), o);
        for (int j = 0; j < strip.n; j++) {
            Column sum = {0, 0};
            for (int slice = 0; slice < SLICES; slice++) {
                const Column part = column_of(x, strip, j, slice);
                sum.c += part.c;
                sum.w += part.w;
            }
            double u, C;
            finish_column(x, strip, j, sum, mean, now[strip.item].rule, u, C);
            total += u;
            smallest_C = std::fmin(smallest_C, C);
        }
        for (int thread = 0; thread < THREADS; thread++) row_factors(x, strip, mean, thread);
        strips[index] = {total, may_bind(smallest_R, smallest_C, mean, o)};
    }
    for (int t = 0; t < items.tensors; t++) {
        const Item &x = items.item[t], &next = items.item[t + 1];
        double p = 0, u = 0;
        bool bind = false;
        for (uint32_t i = x.panels; i < next.panels; i++) {
            p += panels[i].p;
            u += panels[i].u;
        }
        for (uint32_t i = x.strips; i < next.strips; i++) {
            u += strips[i].u;
            bind |= strips[i].may_bind;
        }
        if (bind) u = 0;
        for (uint32_t i = x.chunks; i < next.chunks && bind; i++)
            u += sum_of_threads(
                [&](int thread) { return bounded_squares(x, piece_at(items, i), coefficient, now[t].rule, thread); });
        finish_adafactor(now[t].rule, now[t].step, p, u, double(elements(x)), o);
    }
    for (int64_t index = counts.chunks - 1; index >= 0; index--)
        for (int thread = 0; thread < THREADS; thread++) {
            const Piece piece = piece_at(items, uint32_t(index));
            apply_piece<OWN, MOMENTUM>(items.item[piece.item], piece, coefficient, now[piece.item], thread);
        }
}

static void near(double got, double want, double scale, double tolerance) {
    if (std::fabs(got - want) > tolerance * (std::fabs(want) + scale))
        std::printf("got %.9g, expected %.9g\n", got, want), std::exit(1);
}

template <bool MOMENTUM>
static void an_update_follows_the_formulas(
    const Shapes& shapes, int p_dtype, int g_dtype, int m_dtype, int shift, float size, const AdafactorOptions& o) {
    std::mt19937 random(1);
    std::vector<Matrix> tensors;
    for (const auto& shape : shapes) tensors.emplace_back(shape, p_dtype, g_dtype, m_dtype, shift, size, random);
    std::vector<Expected> wanted;
    Update update{};
    Addresses rows, columns;
    Tensors m;
    std::vector<Now<Adafactor>> now;
    for (Matrix& x : tensors) {
        wanted.push_back(expected(x, 3.0, 0.5, MOMENTUM, o));
        update.params.push_back(x.p.tensor());
        update.grads.push_back(x.g.tensor());
        m.push_back(x.m.tensor());
        rows.push_back(reinterpret_cast<Address>(x.R.data()));
        columns.push_back(reinterpret_cast<Address>(x.C.data()));
        now.push_back({make_rule(3.0, o), 3, 0});
    }
    if (!MOMENTUM) m.clear();
    const Group all{0, shapes.size()};
    const Counts counts = counts_of(shapes, all);
    const std::unique_ptr<float[]> floats(new float[counts.floats]);
    const auto items = std::make_unique<Items>();
    describe({update, shapes, rows, columns, m}, all, floats.get(), *items);
    step<MOMENTUM>(*items, counts, now, 0.5f, o);
    const auto ulp = [](int dtype) { return dtype == F32 ? 0x1p-20 : 0x1p-8; };
    for (size_t t = 0; t < tensors.size(); t++) {
        for (size_t i = 0; i < wanted[t].R.size(); i++) near(tensors[t].R[i], wanted[t].R[i], 0, 1e-6);
        for (size_t i = 0; i < wanted[t].C.size(); i++) near(tensors[t].C[i], wanted[t].C[i], 0, 1e-6);
        for (int64_t i = 0; i < tensors[t].n; i++) near(tensors[t].p.get(i), wanted[t].p[i], 1e-2, ulp(p_dtype));
        for (int64_t i = 0; i < tensors[t].n && MOMENTUM; i++)
            near(tensors[t].m.get(i), wanted[t].m[i], 1e-2, ulp(m_dtype));
    }
}

static void updates() {
    const Shapes shapes = {{1, 64, 33}, {1, 7, 0}, {1, 1, 0}, {3, 20, 50}, {1, 0, 0}, {1, 1, 1}, {1, 5, 3001},
        {1, 1500, 3}, {1, 300, 1}, {40, 3, 3}, {1, 70, 768}, {2, 9, 2052}, {1, 40003, 0}};
    // every tensor is clipped
    const AdafactorOptions t5{1e-2, true, HUGE_VAL, 0.8, 0.0, 1e-30, 0.0, 1e-3, true, 1.0, 0.1, 0.9, 0.1, true};
    AdafactorOptions torch = t5;
    torch.eps_square = 0.0;
    torch.eps_bound = 0x1p-23;
    torch.decay_by_step = false;
    for (const AdafactorOptions& o : {t5, torch})
        for (int shift : {0, 1}) {
            an_update_follows_the_formulas<false>(shapes, F32, F32, F32, shift, 1.0f, o);
            an_update_follows_the_formulas<true>(shapes, F32, BF16, F32, shift, 1.0f, o);
            an_update_follows_the_formulas<true>(shapes, BF16, BF16, BF16, shift, 1.0f, o);
        }
    an_update_follows_the_formulas<false>(shapes, F32, F32, F32, 0, 2e-7f, torch);  // where the bound binds
}

int main() {
    geometry();
    updates();
}
