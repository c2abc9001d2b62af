/* Adafactor over lists of tensors; rules/adafactor.h has the scheme, panels.h how tensors are cut, adafactor.h what
threads compute.

For each group of tensors: its panels are measured, strips of columns add up what the panels found, one block a tensor
makes α and RMS(U) of that, and the update follows. An element in fp32 moves 20 bytes (reads g, θ; reads g, θ again and
writes θ), 12 where the second-level cache still holds the group, half as many in bf16; 8 more for momentum; besides 16
for each column of a panel, a byte or two an element where rows are long, which are written and read within two
launches. Sums have a fixed order, and nothing is an atomic. */
#include "adafactor.h"
#include "optimizer.cuh"

namespace fastlm {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

struct Scratch {
    Now<Adafactor>* now;  // one for each tensor of the group
    PanelSums* panels;
    StripSums* strips;
    double* chunks;       // Σ U² of each, where the bound may bind
    int* may_bind;        // one for each tensor
};

template <Precision PRECISION>
__global__ void __launch_bounds__(THREADS, 3)
    adafactor_measure(const __grid_constant__ Items items, const Scratch scratch, const Flags flags) {
    __shared__ float inverse[MOST_ROWS];
    if (flags.skip()) return;
    const Panel panel = panel_at(items, blockIdx.x);
    const Item& x = items.item[panel.item];
    const Adafactor c = scratch.now[panel.item].rule;
    const float coefficient = flags.factor();
    PanelSums& sums = scratch.panels[blockIdx.x];
    double u = 0.0, p = 0.0;
    if (x.columns == 0) {
        u = block_sum<THREADS>(average_squares(x, panel, coefficient, c, threadIdx.x));
    } else {
        // R_i of each row, by a warp; then, with R_i known, what the panel adds to Σ_i G² and Σ_i G²/R_i
        const int lane = threadIdx.x % WARP;
        for (int r = threadIdx.x / WARP; r < panel.rows; r += THREADS / WARP) {
            const double sum = warp_fold(row_squares(x, panel, r, coefficient, lane), Plus());
            if (lane == 0) inverse[r] = finish_row(x, panel, r, sum, c);
        }
        __syncthreads();
        column_sums(x, panel, inverse, coefficient, threadIdx.x);
        if (threadIdx.x == 0) sum_rows(x, panel, inverse, sums);
    }
    if (threadIdx.x == 0) sums.u = u;
    __syncthreads();
    if (c.scaled) p = block_sum<THREADS>(parameter_squares<PRECISION>(x, panel, threadIdx.x));
    if (threadIdx.x == 0) sums.p = p;
}

__global__ void __launch_bounds__(THREADS) adafactor_columns(const __grid_constant__ Items items, const Scratch scratch,
    const __grid_constant__ AdafactorOptions options, const Flags flags) {
    __shared__ double mean, smallest_R;
    __shared__ Column columns[SLICES][STRIP];
    if (flags.skip()) return;
    const Strip strip = strip_at(items, blockIdx.x);
    const Item& x = items.item[strip.item];
    const int j = threadIdx.x % STRIP, slice = threadIdx.x / STRIP;
    // mean(R) and min R of the strip's matrix, from all its panels
    double R = 0.0, least = HUGE_VAL;
    for (uint32_t q = threadIdx.x; q < strip.panels; q += THREADS) {
        const PanelSums& sums = scratch.panels[strip.panel + q];
        R += sums.R;
        least = Least()(least, sums.smallest_R);
    }
    R = block_fold<THREADS>(R, Plus());
    __syncthreads();
    least = block_fold<THREADS>(least, Least());
    if (threadIdx.x == 0) {
        mean = mean_of_rows(R, double(x.rows), options);
        smallest_R = least;
    }
    // the strip's column sums, in slices; a_i of its share of the rows; then C_j, b_j and Σ U²
    if (j < strip.n) columns[slice][j] = column_of(x, strip, j, slice);
    __syncthreads();
    row_factors(x, strip, mean, threadIdx.x);
    if (slice > 0) return;  // a warp is left
    double u = 0.0, smallest_C = HUGE_VAL;
    if (j < strip.n) {
        Column sum = {0.0, 0.0};
        for (int s = 0; s < SLICES; s++) {
            sum.c += columns[s][j].c;
            sum.w += columns[s][j].w;
        }
        finish_column(x, strip, j, sum, mean, scratch.now[strip.item].rule, u, smallest_C);
    }
    u = warp_fold(u, Plus());
    smallest_C = warp_fold(smallest_C, Least());
    if (threadIdx.x == 0) scratch.strips[blockIdx.x] = {u, may_bind(smallest_R, smallest_C, mean, options)};
}

// A block for each tensor: its step, from Σ θ² and Σ U². bounded: once more for those whose Σ U² may have been wrong,
// from that of their chunks.
__global__ void __launch_bounds__(THREADS) adafactor_finish(const __grid_constant__ Items items, const Scratch scratch,
    const __grid_constant__ AdafactorOptions options, const Flags flags, bool bounded) {
    if (flags.skip()) return;
    const Item &x = items.item[blockIdx.x], &next = items.item[blockIdx.x + 1];
    if (bounded && !scratch.may_bind[blockIdx.x]) return;
    double p = 0.0, u = 0.0;
    bool bad = false;
    for (uint32_t i = x.panels + threadIdx.x; i < next.panels; i += THREADS) {
        p += scratch.panels[i].p;
        u += bounded ? 0.0 : scratch.panels[i].u;
    }
    for (uint32_t i = x.strips + threadIdx.x; !bounded && i < next.strips; i += THREADS) {
        u += scratch.strips[i].u;
        bad |= scratch.strips[i].may_bind;
    }
    for (uint32_t i = x.chunks + threadIdx.x; bounded && i < next.chunks; i += THREADS) u += scratch.chunks[i];
    p = block_sum<THREADS>(p);
    bad = __syncthreads_or(bad);
    u = block_sum<THREADS>(u);
    if (threadIdx.x > 0) return;
    Now<Adafactor>& now = scratch.now[blockIdx.x];
    finish_adafactor(now.rule, now.step, p, u, double(elements(x)), options);
    if (!bounded) scratch.may_bind[blockIdx.x] = bad;
}

__global__ void __launch_bounds__(THREADS)
    adafactor_bounded(const __grid_constant__ Items items, const Scratch scratch, const Flags flags) {
    if (flags.skip()) return;
    const Piece piece = piece_at(items, blockIdx.x);
    if (!scratch.may_bind[piece.item]) return;
    const double u =
        bounded_squares(items.item[piece.item], piece, flags.factor(), scratch.now[piece.item].rule, threadIdx.x);
    const double sum = block_sum<THREADS>(u);
    if (threadIdx.x == 0) scratch.chunks[blockIdx.x] = sum;
}

// The last piece first: of a group that the cache does not hold, it has what was measured last.
template <Precision PRECISION, bool MOMENTUM>
__global__ void __launch_bounds__(THREADS)
    adafactor_apply(const __grid_constant__ Items items, const Scratch scratch, const Flags flags) {
    if (flags.skip()) return;
    const Piece piece = piece_at(items, gridDim.x - 1 - blockIdx.x);
    const Now<Adafactor> now = scratch.now[piece.item];
    apply_piece<PRECISION, MOMENTUM>(items.item[piece.item], piece, flags.factor(), now, threadIdx.x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

static_assert(sizeof(Items) + sizeof(AdafactorOptions) + sizeof(Scratch) + sizeof(Flags) + 16 <= ARGUMENT_BYTES,
    "the options do not fit beside the lists");

static std::vector<Group> groups_of(const Sizes& sizes) { return groups(sizes, TOGETHER, Items::CAPACITY); }

static int64_t bytes_of(const Counts& counts, size_t tensors) {
    return counts.panels * int64_t(sizeof(PanelSums)) + counts.strips * int64_t(sizeof(StripSums)) +
           counts.chunks * int64_t(sizeof(double)) + divided(int64_t(tensors), 2) * 8 + counts.floats * 4;
}

int64_t adafactor_workspace(const Shapes& shapes) {
    int64_t most = 0;
    for (const Group& group : groups_of(sizes_of(shapes)))
        most = std::max(most, bytes_of(counts_of(shapes, group), group.end - group.begin));
    return int64_t(shapes.size() * sizeof(Now<Adafactor>)) + most;
}

template <Precision PRECISION>
static void launch_group(const Items& items, const Counts& counts, const Scratch& scratch,
    const AdafactorOptions& options, const Flags& flags, bool momentum, cudaStream_t queue) {
    const unsigned panels = unsigned(counts.panels), strips = unsigned(counts.strips), chunks = unsigned(counts.chunks);
    const unsigned tensors = unsigned(items.tensors);
    if (chunks == 0) return;
    // R, Σ θ², and the column sums of every panel; C and Σ U² from them; then each tensor's α / max(1, RMS(U)/d)
    adafactor_measure<PRECISION><<<panels, THREADS, 0, queue>>>(items, scratch, flags);
    if (strips > 0) adafactor_columns<<<strips, THREADS, 0, queue>>>(items, scratch, options, flags);
    adafactor_finish<<<tensors, THREADS, 0, queue>>>(items, scratch, options, flags, false);
    // torch's bound on 1/√V may make Σ U² another: those tensors measure U itself
    if (strips > 0 && options.eps_bound > 0.0) {
        adafactor_bounded<<<chunks, THREADS, 0, queue>>>(items, scratch, flags);
        adafactor_finish<<<tensors, THREADS, 0, queue>>>(items, scratch, options, flags, true);
    }
    // θ ← decay · θ - α U / max(1, RMS(U)/d), through the momentum if there is one
    if (momentum) adafactor_apply<PRECISION, true><<<chunks, THREADS, 0, queue>>>(items, scratch, flags);
    else adafactor_apply<PRECISION, false><<<chunks, THREADS, 0, queue>>>(items, scratch, flags);
    check(cudaGetLastError(), "launch adafactor");
}

void launch_adafactor(const Update& update, const Shapes& shapes, const Addresses& rows, const Addresses& columns,
    const Tensors& m, const AdafactorOptions& options, Address workspace, int device, Address stream) {
    const Sizes sizes = sizes_of(shapes);
    check_update(update, sizes, {});
    check_factors(rows, columns, shapes, sizes);
    check_workspace(workspace, sizes);
    if (!m.empty()) check_list("exp_avgs", m, sizes);
    for (const auto& [matrices, height, width] : shapes)
        check(width == 0 || (width <= WIDEST && matrices * height <= TALLEST),
            "a factored tensor has over 2²⁷ columns or 2³⁰ rows; use_backend(adafactor=\"reference\") serves it");
    if (sizes.empty()) return;
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const auto now = reinterpret_cast<Now<Adafactor>*>(workspace);
    const Flags flags = flags_of(update);
    launch_advance(update, options, now, queue);
    const Adafactors lists{update, shapes, rows, columns, m};
    for (const Group& group : groups_of(sizes)) {
        // the group's part of the workspace: a place for what each of its pieces finds
        const Counts counts = counts_of(shapes, group);
        const auto panels = reinterpret_cast<PanelSums*>(now + sizes.size());
        const auto strips = reinterpret_cast<StripSums*>(panels + counts.panels);
        const auto chunks = reinterpret_cast<double*>(strips + counts.strips);
        const auto may_bind = reinterpret_cast<int*>(chunks + counts.chunks);
        const auto floats = reinterpret_cast<float*>(may_bind + 2 * divided(int64_t(group.end - group.begin), 2));
        const Scratch scratch{now + group.begin, panels, strips, chunks, may_bind};
        Items items;
        describe(lists, group, floats, items);
        const auto launch = !update.masters.empty() ? launch_group<MASTER>
                            : update.keys.empty()   ? launch_group<OWN>
                                                    : launch_group<STOCHASTIC>;
        launch(items, counts, scratch, options, flags, !m.empty(), queue);
    }
}

}  // namespace fastlm
