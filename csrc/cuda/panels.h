/*
How Adafactor's tensors reach its kernels and are cut. Host and device code.

A matrix is measured in panels, some rows that one block takes whole. Of 16,384 elements, because the panels of all
blocks in flight should fit the second-level cache, but of LEAST_ROWS at least: what is kept of a panel is two sums for
each of its columns. Strips of 32 columns then add up the panels' sums, in order. A tensor that is not factored is
measured in chunks. The update does not need whole rows and takes chunks of every tensor.

Lists reach the kernels as one argument, as in batch.h, but tensors come in groups: a group's gradients and parameters
are read when it is measured and again when it is updated, and stay in the second-level cache in between, where that
holds them.
*/
#pragma once

#include "parameter.h"

namespace fastlm {

constexpr int64_t TOGETHER = 1 << 23;          // elements of a group: 32 MB of gradients and parameters in bf16
constexpr int LEAST_ROWS = 8, MOST_ROWS = 64;  // of a panel: few column sums to keep, few terms in each
// columns of a strip; slices of the panels, which its block sums side by side
constexpr int STRIP = 32, SLICES = THREADS / STRIP;
// columns, and rows of all matrices of a tensor: numbers of 32 bits, with room
constexpr int64_t WIDEST = 1 << 27, TALLEST = 1 << 30;

// ---------------------------------------------------------------------------------------------------------------------
// What kernels are given

enum List { P, MASTERS, G, M, LISTS };

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

struct Panel {  // or the chunk of a tensor that is not factored: rows 0
    int item, rows;
    uint32_t number;        // in its tensor
    int64_t row, begin, n;  // first row, counted over the tensor's matrices; first element; elements
};

struct Piece {
    int item, n;
    int64_t begin;
};  // n elements, of any rows

struct Strip {  // columns first … first + n - 1 of a matrix
    int item, n;
    uint32_t matrix, number, first, panel, panels;  // its panels are panel … panel + panels - 1
};

FASTLM_RULE int64_t at_least(int64_t x, int64_t least) { return x < least ? least : x; }
FASTLM_RULE int64_t at_most(int64_t x, int64_t most) { return x > most ? most : x; }
FASTLM_RULE int64_t divided(int64_t x, int64_t by) { return (x + by - 1) / by; }

FASTLM_RULE int64_t height(int64_t columns) {
    return columns == 0 ? CHUNK : at_least(at_most(CHUNK / columns, MOST_ROWS), LEAST_ROWS);
}
FASTLM_RULE float* sums_of(const Item& x, uint32_t panel) { return x.sums + int64_t(panel) * 2 * x.columns; }
FASTLM_RULE int64_t elements(const Item& x) { return int64_t(x.matrices) * x.rows * at_least(x.columns, 1); }

// The item that has piece `index`; first: the count of pieces in question before an item.
FASTLM_RULE int item_of(const Items& items, uint32_t Item::* first, uint32_t index) {
    return tensor_at(index, int(items.tensors), [&](int i) { return items.item[i].*first; });
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
    const uint32_t local = index - x.strips, each = (x.columns + STRIP - 1) / STRIP,
                   panels = uint32_t(divided(x.rows, height(x.columns)));
    const uint32_t matrix = local / each, number = local % each;
    return {i, int(at_most(x.columns - number * STRIP, STRIP)), matrix, number, number * STRIP,
        x.panels + matrix * panels, panels};
}

// n elements of the named lists, from element `begin` of the tensor.
template <int... NAMES>
FASTLM_RULE Chunk<sizeof...(NAMES)> run_of(const Item& x, int64_t begin, int n) {
    return {{x.data[NAMES] + begin * element_size(x.dtype[NAMES])...}, {x.dtype[NAMES]...}, n, 0, 0, begin};
}

// The parameter as it is kept, and other lists after it.
template <Precision PRECISION, int... NAMES>
FASTLM_RULE Chunk<REST<PRECISION> + sizeof...(NAMES)> parameter_run(const Item& x, int64_t begin, int n) {
    if constexpr (PRECISION == MASTER) return run_of<P, MASTERS, NAMES...>(x, begin, n);
    else return run_of<P, NAMES...>(x, begin, n);
}

FASTLM_RULE Piece piece_at(const Items& items, uint32_t index) {
    const int i = item_of(items, &Item::chunks, index);
    const int64_t begin = int64_t(index - items.item[i].chunks) * CHUNK;
    return {i, int(at_most(elements(items.item[i]) - begin, CHUNK)), begin};
}

// ---------------------------------------------------------------------------------------------------------------------
// A group's arguments and memory

struct Counts {
    int64_t panels = 0, strips = 0, chunks = 0, floats = 0;
};  // floats: of a, b and sums

static inline Counts counts_of(const std::array<int64_t, 3>& shape) {
    const auto [matrices, rows, columns] = shape;
    const int64_t panels = matrices * divided(rows, height(columns)),
                  chunks = divided(matrices * rows * at_least(columns, 1), CHUNK);
    if (panels == 0 || columns == 0) return {panels, 0, chunks, 0};
    return {panels, matrices * divided(columns, STRIP), chunks, matrices * (rows + columns) + 2 * panels * columns};
}

static inline Counts counts_of(const Shapes& shapes, const Group& group) {
    Counts sum;
    for (size_t t = group.begin; t < group.end; t++) {
        const Counts one = counts_of(shapes[t]);
        sum.panels += one.panels;
        sum.strips += one.strips;
        sum.chunks += one.chunks;
        sum.floats += one.floats;
    }
    return sum;
}

struct Adafactors {  // what a launcher is given
    const Update& update;
    const Shapes& shapes;
    const Addresses &rows, &columns;
    const Tensors& m;
};

// Describe a group to the kernels. floats: memory of counts_of(…).floats.
static inline void describe(const Adafactors& lists, const Group& group, float* floats, Items& items) {
    items.tensors = int64_t(group.end - group.begin);
    Counts before;
    for (size_t t = group.begin; t <= group.end; t++) {
        Item& x = items.item[t - group.begin];
        x.panels = uint32_t(before.panels);
        x.strips = uint32_t(before.strips);
        x.chunks = uint32_t(before.chunks);
        if (t == group.end) break;
        const Tensors* const all[LISTS] = {&lists.update.params, &lists.update.masters, &lists.update.grads, &lists.m};
        for (int l = 0; l < LISTS; l++) {
            const std::pair<Address, int> none = {0, F32}, &one = all[l]->empty() ? none : (*all[l])[t];
            x.data[l] = reinterpret_cast<char*>(one.first);
            x.dtype[l] = uint8_t(one.second);
        }
        const auto [matrices, rows, columns] = lists.shapes[t];
        x.matrices = uint32_t(matrices);
        x.rows = rows;
        x.columns = uint32_t(columns);
        x.R = reinterpret_cast<float*>(lists.rows[t]);
        x.C = reinterpret_cast<float*>(lists.columns[t]);
        // a of every row, b of every column, then the column sums of every panel
        x.a = floats + before.floats;
        x.b = x.a + matrices * rows;
        x.sums = x.b + matrices * columns;
        const Counts one = counts_of(lists.shapes[t]);
        before.panels += one.panels;
        before.strips += one.strips;
        before.chunks += one.chunks;
        before.floats += one.floats;
    }
}

}  // namespace fastlm
