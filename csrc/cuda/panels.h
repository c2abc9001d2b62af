/*
Adafactor on a GPU, as host and device code: tests run it on the host. rules/adafactor.h has the scheme, adafactor.cu the kernels.

A matrix is measured in panels, some rows that one block takes whole. A warp sums the squares of a row, and knows R_i; then every thread walks
down columns of the panel and writes what its rows add to the two column sums, reading the gradient a second time, from a cache. Of
16,384 elements a panel, because the panels of all blocks in flight should fit the second-level cache, but of LEAST_ROWS at least:
the sums of a panel are 8 bytes for each of its columns. Strips of 32 columns then add up the panels' sums, in order. A tensor that is
not factored is measured in chunks. The update does not need whole rows and takes chunks of every tensor.

Lists reach the kernels as one argument, as in batch.h, and here tensors come in groups: a group's gradients and parameters are read when it is measured
and again when it is updated, and stay in the second-level cache in between, where that holds them.
*/
#pragma once

#include "../rules/adafactor.h"
#include "parameter.h"
#include "squares.h"

namespace fastlm {

constexpr int64_t TOGETHER = 1 << 23;          // elements of a group: 32 MB of gradients and parameters in bf16
constexpr int LEAST_ROWS = 8, MOST_ROWS = 64;  // of a panel: few column sums to keep, few terms in each
constexpr int STRIP = 32, SLICES = THREADS / STRIP;  // columns of a strip; slices of the panels, which its block sums side by side
constexpr int64_t WIDEST = 1 << 27, TALLEST = 1 << 30;  // columns, and rows of all matrices of a tensor: numbers of 32 bits, with room

// ---------------------------------------------------------------------------------------------------------------------
// What kernels are given

enum List { P, COMPANIONS, G, M, LISTS };

struct Item {  // a tensor: `matrices` dense ones of [rows, columns]; columns 0: not factored, `rows` elements
    char* data[LISTS];
    uint8_t dtype[LISTS];
    uint32_t matrices, columns;
    int64_t rows;
    float *R, *C;             // the factors; R [rows] of one that is not factored is its average of squares
    float *a, *b;             // of every row √(mean(R)/R), of every column 1/√C
    float* sums;              // of each panel Σ_i G² and Σ_i G²/R_i, [2, columns]
    uint32_t panels, strips, chunks;  // how many are before this tensor's
};

struct Items {
    static constexpr int CAPACITY = (ARGUMENT_BYTES - 4 * OTHER_ARGUMENT_BYTES) / int(sizeof(Item)) - 1;
    int64_t tensors;
    Item item[CAPACITY + 1];  // the last one only counts what is before it
};

struct PanelSums { double p, u, R, smallest_R; };  // Σ θ²; Σ U² of a chunk that is not factored; Σ R_i, min R_i where there is a gradient
struct StripSums { double u; bool may_bind; };     // Σ U² of its columns, and whether that may be wrong

struct Panel {  // or the chunk of a tensor that is not factored: rows 0
    int item, rows;
    uint32_t number;        // in its tensor
    int64_t row, begin, n;  // first row, counted over the tensor's matrices; first element; elements
};

struct Piece { int item, n; int64_t begin; };  // n elements, of any rows

struct Strip {  // columns first … first + n - 1 of a matrix
    int item, n;
    uint32_t matrix, number, first, panel, panels;  // its panels are panel … panel + panels - 1
};

FASTLM_RULE int64_t at_least(int64_t x, int64_t least) { return x < least ? least : x; }
FASTLM_RULE int64_t at_most(int64_t x, int64_t most) { return x > most ? most : x; }
FASTLM_RULE int64_t divided(int64_t x, int64_t by) { return (x + by - 1) / by; }

FASTLM_RULE int64_t height(int64_t columns) { return columns == 0 ? CHUNK : at_least(at_most(CHUNK / columns, MOST_ROWS), LEAST_ROWS); }
FASTLM_RULE float* sums_of(const Item& x, uint32_t panel) { return x.sums + int64_t(panel) * 2 * x.columns; }
FASTLM_RULE int64_t elements(const Item& x) { return int64_t(x.matrices) * x.rows * at_least(x.columns, 1); }

// The last item of which piece `index` may be; first: the count of pieces in question before an item.
FASTLM_RULE int item_of(const Items& items, uint32_t Item::*first, uint32_t index) {
    int low = 0, high = int(items.tensors);
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (items.item[middle].*first <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

FASTLM_RULE Panel panel_at(const Items& items, uint32_t index) {
    const int i = item_of(items, &Item::panels, index);
    const Item& x = items.item[i];
    const uint32_t local = index - x.panels, each = uint32_t(divided(x.rows, height(x.columns)));  // panels of a matrix
    const int64_t first = int64_t(local % each) * height(x.columns), rows = at_most(x.rows - first, height(x.columns));
    const int64_t row = int64_t(local / each) * x.rows + first;
    if (x.columns == 0) return {i, 0, local, 0, row, rows};
    return {i, int(rows), local, row, row * x.columns, rows * x.columns};
}

FASTLM_RULE Strip strip_at(const Items& items, uint32_t index) {
    const int i = item_of(items, &Item::strips, index);
    const Item& x = items.item[i];
    const uint32_t local = index - x.strips, each = (x.columns + STRIP - 1) / STRIP, panels = uint32_t(divided(x.rows, height(x.columns)));
    const uint32_t matrix = local / each, number = local % each;
    return {i, int(at_most(x.columns - number * STRIP, STRIP)), matrix, number, number * STRIP, x.panels + matrix * panels, panels};
}

// n elements of the named lists, from element `begin` of the tensor.
template <int... NAMES>
FASTLM_RULE Chunk<sizeof...(NAMES)> run_of(const Item& x, int64_t begin, int n) {
    return {{x.data[NAMES] + begin * element_size(x.dtype[NAMES])...}, {x.dtype[NAMES]...}, n, 0, 0, begin};
}

// The parameter as it is kept, and other lists after it.
template <Kept KEPT, int... NAMES>
FASTLM_RULE Chunk<REST<KEPT> + sizeof...(NAMES)> parameter_run(const Item& x, int64_t begin, int n) {
    if constexpr (KEPT == COMPANION) return run_of<P, COMPANIONS, NAMES...>(x, begin, n);
    else return run_of<P, NAMES...>(x, begin, n);
}

FASTLM_RULE Piece piece_at(const Items& items, uint32_t index) {
    const int i = item_of(items, &Item::chunks, index);
    const int64_t begin = int64_t(index - items.item[i].chunks) * CHUNK;
    return {i, int(at_most(elements(items.item[i]) - begin, CHUNK)), begin};
}

// ---------------------------------------------------------------------------------------------------------------------
// The first pass

template <int LISTS>
FASTLM_RULE void scale(float (&x)[LISTS][VECTOR], float coefficient) {
#pragma unroll
    for (int e = 0; e < VECTOR; e++) x[0][e] *= coefficient;
}

// One lane's part of Σ_j G_ij² of row r of a panel.
FASTLM_RULE double row_squares(const Item& x, const Panel& panel, int r, float coefficient, int lane) {
    double sum = 0.0;
    map<0, 4, WARP>(run_of<G>(x, panel.begin + int64_t(r) * x.columns, int(x.columns)), lane, [&](float (&g)[1][VECTOR], int) {
        scale(g, coefficient);
        sum += sum_of_squares(g[0]);
    });
    return sum;
}

// Update R_i from the row's sum and return what its G² are multiplied by in Σ_i G²/R_i.
FASTLM_RULE float finish_row(const Item& x, const Panel& panel, int r, double sum, const Adafactor& c) {
    float& R = x.R[panel.row + r];
    R = ema(R, float(sum / double(x.columns)), c);
    return sum == 0.0 ? 0.0f : 1.0f / R;  // a row without gradient adds nothing to U, whatever its average
}

// One thread's part of the panel's column sums.
FASTLM_RULE void column_sums(const Item& x, const Panel& panel, const float* inverse, float coefficient, int thread) {
    const Chunk<1> all = run_of<G>(x, panel.begin, 0);
    const bool whole = aligned(all) && x.columns % VECTOR == 0;
    const int64_t row_bytes = int64_t(x.columns) * element_size(all.dtype[0]);
    float *const c_sums = sums_of(x, panel.number), *const w_sums = c_sums + x.columns;
    for (int i = thread; VECTOR * i < int(x.columns); i += THREADS) {
        float c[VECTOR] = {}, w[VECTOR] = {};
#pragma unroll 4
        for (int r = 0; r < panel.rows; r++) {
            const char* row = static_cast<const char*>(all.data[0]) + r * row_bytes;
            float g[1][VECTOR];
            widen_vector(whole ? load_vector(row, all.dtype[0], i) : load_elements(row, all.dtype[0], i, int(x.columns)), all.dtype[0], g[0]);
            scale(g, coefficient);
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                const float square = g[0][e] * g[0][e];
                c[e] += square, w[e] += square * inverse[r];
            }
        }
#pragma unroll
        for (int e = 0; e < VECTOR; e++)
            if (VECTOR * i + e < int(x.columns)) c_sums[VECTOR * i + e] = c[e], w_sums[VECTOR * i + e] = w[e];
    }
}

// Σ R_i and min R_i, in order.
FASTLM_RULE void sum_rows(const Item& x, const Panel& panel, const float* inverse, PanelSums& sums) {
    sums.R = 0.0, sums.smallest_R = HUGE_VAL;
    for (int r = 0; r < panel.rows; r++) {
        const double R = x.R[panel.row + r];
        sums.R += R;
        if (inverse[r] != 0.0f && R < sums.smallest_R) sums.smallest_R = R;
    }
}

// One thread's part of Σ θ².
template <Kept KEPT>
FASTLM_RULE double parameter_squares(const Item& x, const Panel& panel, int thread) {
    const Chunk<REST<KEPT>> chunk = parameter_run<KEPT>(x, panel.begin, int(panel.n));
    double sum = 0.0;
    map<0, 2>(chunk, thread, [&](float (&p)[REST<KEPT>][VECTOR], int) {
        float theta[VECTOR];
#pragma unroll
        for (int e = 0; e < VECTOR; e++) theta[e] = read<KEPT>(p, e, chunk.dtype[REST<KEPT> - 1]);
        sum += sum_of_squares(theta);
    });
    return sum;
}

// One thread's part of Σ U² of a chunk that is not factored, whose averages it updates: one vector in flight, because with more `map` comes to vectors
// past the end, of which the first may hold elements that come again.
FASTLM_RULE double average_squares(const Item& x, const Panel& panel, float coefficient, const Adafactor& c, int thread) {
    float* const v = x.R + panel.begin;
    double sum = 0.0;
    map<0, 1>(run_of<G>(x, panel.begin, int(panel.n)), thread, [&](float (&g)[1][VECTOR], int i) {
        scale(g, coefficient);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) {
            const int o = VECTOR * i + e;
            if (o >= int(panel.n)) continue;
            v[o] = ema(v[o], g[0][e] * g[0][e], c);
            g[0][e] *= factored_rate(1.0f, 1.0f / sqrtf(v[o]), c);
        }
        sum += sum_of_squares(g[0]);
    });
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Between the passes

struct Column { double c, w; };  // Σ_i G_ij², Σ_i G_ij²/R_i

// Column j of a strip over every SLICES-th panel of its matrix.
FASTLM_RULE Column column_of(const Item& x, const Strip& strip, int j, int slice) {
    Column sum = {0.0, 0.0};
#pragma unroll 4
    for (uint32_t q = slice; q < strip.panels; q += SLICES) {
        const float* c = sums_of(x, strip.panel - x.panels + q) + strip.first + j;
        sum.c += c[0], sum.w += c[x.columns];
    }
    return sum;
}

// Update C_j and b_j, and give the column's part of Σ U² and its C_j, both neutral where it has no gradient.
FASTLM_RULE void finish_column(const Item& x, const Strip& strip, int j, const Column& sum, double mean, const Adafactor& c, double& u, double& smallest_C) {
    const int64_t at = int64_t(strip.matrix) * x.columns + strip.first + j;
    const float C = x.C[at] = ema(x.C[at], float(sum.c / double(x.rows)), c);
    x.b[at] = float(1.0 / sqrt(double(C)));
    u = sum.c == 0.0 ? 0.0 : mean * (sum.w / double(C));
    smallest_C = sum.c == 0.0 ? HUGE_VAL : double(C);
}

// One thread's part of a_i: a strip does as many rows of its matrix as each other strip.
FASTLM_RULE void row_factors(const Item& x, const Strip& strip, double mean, int thread) {
    const int64_t begin = int64_t(strip.matrix) * x.rows, strips = divided(x.columns, STRIP);
    for (int64_t i = int64_t(strip.number) * THREADS + thread; i < x.rows; i += strips * THREADS)
        x.a[begin + i] = float(sqrt(mean / double(x.R[begin + i])));
}

// ---------------------------------------------------------------------------------------------------------------------
// The second pass

struct Place { uint32_t row, column; };  // of an element, the row counted over the tensor's matrices

FASTLM_RULE Place place_of(const Item& x, int64_t element) {
    return x.columns == 0 ? Place{0, 0} : Place{uint32_t(element / x.columns), uint32_t(element % x.columns)};
}

// 1/√V of element o of a piece that begins at `first`; past the end, of the last.
FASTLM_RULE float rate_of(const Item& x, const Piece& piece, const Place& first, int o, const Adafactor& c) {
    o = o < piece.n ? o : piece.n - 1;
    if (x.columns == 0) return factored_rate(1.0f, 1.0f / sqrtf(x.R[piece.begin + o]), c);
    const uint32_t flat = first.column + uint32_t(o), i = first.row + flat / x.columns, j = flat % x.columns;
    const uint32_t matrix = x.matrices == 1 ? 0 : i / uint32_t(x.rows);
    return factored_rate(x.a[i], x.b[int64_t(matrix) * x.columns + j], c);
}

// One thread's part of Σ U² of a piece, where the bound may bind.
FASTLM_RULE double bounded_squares(const Item& x, const Piece& piece, float coefficient, const Adafactor& c, int thread) {
    const Place first = place_of(x, piece.begin);
    double sum = 0.0;
    map<0, 2>(run_of<G>(x, piece.begin, piece.n), thread, [&](float (&g)[1][VECTOR], int i) {
        scale(g, coefficient);
#pragma unroll
        for (int e = 0; e < VECTOR; e++) g[0][e] *= rate_of(x, piece, first, VECTOR * i + e, c);
        sum += sum_of_squares(g[0]);
    });
    return sum;
}

// One thread's part of the update of a piece.
template <Kept KEPT, bool MOMENTUM>
FASTLM_RULE void apply_piece(const Item& x, const Piece& piece, float coefficient, const Now<Adafactor>& now, int thread) {
    constexpr int GRAD = REST<KEPT>, BUFFER = GRAD + 1, ALL = GRAD + 1 + MOMENTUM;
    const Place first = place_of(x, piece.begin);
    const Adafactor& c = now.rule;
    const float s = c.step_size * coefficient;
    const auto update = [&](const auto& chunk) {
        map<WRITTEN<KEPT, MOMENTUM ? 0b10 : 0>, ALL <= 2 ? 2 : 1>(chunk, thread, [&](float (&v)[ALL][VECTOR], int i) {
            float theta[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e++) {
                const float u = s * v[GRAD][e] * rate_of(x, piece, first, VECTOR * i + e, c);
                theta[e] = read<KEPT>(v, e, chunk.dtype[1]) * c.decay;
                if constexpr (MOMENTUM) theta[e] -= v[BUFFER][e] = c.beta1 * v[BUFFER][e] + c.one_beta1 * u;
                else theta[e] -= u;
            }
            write<KEPT>(theta, v, chunk.dtype[1], piece.begin + VECTOR * i, now.step, now.key);
        });
    };
    if constexpr (MOMENTUM) update(parameter_run<KEPT, G, M>(x, piece.begin, piece.n));
    else update(parameter_run<KEPT, G>(x, piece.begin, piece.n));
}

// ---------------------------------------------------------------------------------------------------------------------
// A group's arguments and memory

struct Counts { int64_t panels = 0, strips = 0, chunks = 0, floats = 0; };  // floats: of a, b and sums

static inline Counts counts_of(const std::array<int64_t, 3>& shape) {
    const auto [matrices, rows, columns] = shape;
    const int64_t panels = matrices * divided(rows, height(columns)), chunks = divided(matrices * rows * at_least(columns, 1), CHUNK);
    if (panels == 0 || columns == 0) return {panels, 0, chunks, 0};
    return {panels, matrices * divided(columns, STRIP), chunks, matrices * (rows + columns) + 2 * panels * columns};
}

static inline Counts counts_of(const Shapes& shapes, const Group& group) {
    Counts sum;
    for (size_t t = group.begin; t < group.end; t++) {
        const Counts one = counts_of(shapes[t]);
        sum.panels += one.panels, sum.strips += one.strips, sum.chunks += one.chunks, sum.floats += one.floats;
    }
    return sum;
}

struct Adafactors {  // what a launcher is given
    const Parameters& p;
    const Tensors& g;
    const Addresses &rows, &columns;
    const Tensors& m;
    const Shapes& shapes;
};

// Describe a group to the kernels. floats: memory of counts_of(…).floats.
static inline void describe(const Adafactors& lists, const Group& group, float* floats, Items& items) {
    items.tensors = int64_t(group.end - group.begin);
    Counts before;
    for (size_t t = group.begin; t <= group.end; t++) {
        Item& x = items.item[t - group.begin];
        x.panels = uint32_t(before.panels), x.strips = uint32_t(before.strips), x.chunks = uint32_t(before.chunks);
        if (t == group.end) break;
        const Tensors* const all[LISTS] = {&lists.p.stored, &lists.p.companions, &lists.g, &lists.m};
        for (int l = 0; l < LISTS; l++) {
            const std::pair<Address, int> none = {0, F32}, &one = all[l]->empty() ? none : (*all[l])[t];
            x.data[l] = reinterpret_cast<char*>(one.first), x.dtype[l] = uint8_t(one.second);
        }
        const auto [matrices, rows, columns] = lists.shapes[t];
        x.matrices = uint32_t(matrices), x.rows = rows, x.columns = uint32_t(columns);
        x.R = reinterpret_cast<float*>(lists.rows[t]), x.C = reinterpret_cast<float*>(lists.columns[t]);
        x.a = floats + before.floats, x.b = x.a + matrices * rows, x.sums = x.b + matrices * columns;
        const Counts one = counts_of(lists.shapes[t]);
        before.panels += one.panels, before.strips += one.strips, before.chunks += one.chunks, before.floats += one.floats;
    }
}

}  // namespace fastlm
