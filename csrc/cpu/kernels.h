/*
The table of CPU kernels that each instruction set fills in. A kernel does one chunk on one thread; threads, lists
and checks are the launchers' (launch.cpp). To add a kernel: an entry here, a file beside this one, a launcher.
*/
#pragma once

#include "../rules/adafactor.h"
#include "../rules/adam.h"
#include "../rules/numeric.h"
#include "../rules/sgd.h"
#include "attention/attention.h"

namespace fastlm {

struct Span {  // a run of elements of one tensor
    void* data;
    int dtype;
};

struct Parameter {  // a run of elements of one parameter, and what completes it to fp32 (isa.h: load, store)
    Span stored;
    Span master;      // fp32, or the 16-bit remainders of bf16; data is null where there is neither
    bool stochastic;  // bf16 without master: round stochastically
    uint64_t key;     // of the parameter's noise
    uint32_t step;
    int64_t first;    // number of the run's first element in the parameter
};

struct Squares {
    double p, r;
};  // Σ θ², Σ r² over a run

struct Panel {  // rows [rows, columns] of one matrix, dense; and what they add to its statistics
    Parameter p;
    Span g, m;  // m.data is null without momentum
    int64_t rows, columns;
    float* R;          // [rows], a part of the matrix's state
    float* c;          // [columns] Σ_i G², of this panel
    float* w;          // [columns] Σ_i G²/R_i
    const float* b;    // [columns] 1/√C, in the second pass
    double mean;       // mean(R), in the second pass
};

struct PanelSums {
    double p, R, smallest_R;
};  // Σ θ², Σ R_i, min R_i

struct Rotation {  // one row [D] of x and of the result, with its angles [R/2]
    const void* x;
    void* out;
    int dtype;
    const float *cos, *sin;
    int D, R;
    bool interleaved;
};

struct Norm {  // of dense rows [D]; data is null where nothing is given
    Span x, residual, y, s;      // s = x + residual
    const float *weight, *bias;  // [D], with the weight's offset
    float *mean, *rstd;          // of each row; mean is null for RMS norm
    int64_t D;
    float eps;
    bool rounds_first;  // rounded to y's dtype before the weight
};

struct NormBackward {
    Span dy, ds, s, dx;
    const float* weight;
    const float *mean, *rstd;
    int64_t D;
};

enum Activation : int { GELU = 0, GELU_TANH = 1, RELU = 2, SILU = 3, TANH = 4 };  // fastlm/ops/gate.py: ACTIVATIONS

struct Gate {  // of dense rows: x and dx [2 H] gated, gate first, else [H]; y and its gradient [H]
    Span x, y, dx;
    int64_t H;
    int activation;
    bool gated;
};

struct Embedding {  // of rows [D]: dy, and its sum for each token, over places[begins[token]] … in their order
    Span dy, dweight;
    const int64_t *begins, *places;
    int64_t D;
};

struct Logits {  // rows [V] of dtype, of `words` in all; bias [V] or null; softcap 0: none
    int64_t V, words;
    int dtype;
    const float* bias;
    float softcap, temperature, label_smoothing;
};

constexpr int64_t FEW_ROWS = 8;      // fastlm/ops/linear.py: FEW
constexpr int64_t FEW_OUTPUTS = 64;  // made at a time

struct Linear {  // y [rows, N] = x [rows, K] weight [N, K]ᵀ + bias, all dense; rows ≤ FEW_ROWS; bias [N] or null
    Span weight, y;
    const float *x, *bias;
    int64_t rows, K, N;
};

struct RowLoss {
    float lse, wanted;  // (1 - ε) z_label + ε / words Σ_j z_j
};

struct Kernels {
    const char* name;
    // p, m, v updated in place from g · coefficient
    void (*adamw)(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c);
    // LAMB, first pass: m and v updated; second pass: p from m and v
    Squares (*lamb_moments)(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c);
    void (*lamb_apply)(const Parameter& p, Span m, Span v, int64_t n, const Adam& c);
    // b.data is null without momentum
    void (*sgd)(const Parameter& p, Span g, Span b, int64_t n, float coefficient, const Sgd& c);
    // Adafactor, first pass: R updated, c and w written; then Σ U² by reading g again, where the bound may bind; then p
    PanelSums (*adafactor_measure)(const Panel& panel, float coefficient, const Adafactor& c);
    double (*adafactor_bounded)(const Panel& panel, float coefficient, const Adafactor& c);
    void (*adafactor_apply)(const Panel& panel, float coefficient, const Adafactor& c);
    // The same for a run of a tensor that is not factored: v updated, Σ θ² and Σ U² returned; then p
    Squares (*adafactor_measure_run)(
        const Parameter& p, Span g, float* v, int64_t n, float coefficient, const Adafactor& c);
    void (*adafactor_apply_run)(
        const Parameter& p, Span g, Span m, const float* v, int64_t n, float coefficient, const Adafactor& c);
    // Σ g² in fp64; not finite when an element is not
    double (*sum_of_squares)(Span g, int64_t n);
    // g ← factor · g; true if an element was not finite before
    bool (*unscale)(Span g, int64_t n, float factor);
    void (*rotate)(const Rotation& row);
    // rows begin … end - 1; workspace: 3 D. Backward writes what these rows add to dweight and dbias [D], and takes 4 D
    void (*norm)(const Norm& a, int64_t begin, int64_t end, float* workspace);
    void (*norm_backward)(
        const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias, float* workspace);
    // rows begin … end - 1; backward reads x and, in y, its gradient
    void (*gate)(const Gate& a, int64_t begin, int64_t end);
    void (*gate_backward)(const Gate& a, int64_t begin, int64_t end);
    // tokens begin … end - 1; workspace: 5 D
    void (*embedding_backward)(const Embedding& a, int64_t begin, int64_t end, float* workspace);
    // outputs begin … end - 1, at most FEW_OUTPUTS
    void (*linear)(const Linear& a, int64_t begin, int64_t end);
    // of one row of products; then, in its place, the gradient of scale · lse - g · wanted. A label outside of it is no
    // word here
    RowLoss (*logits_measure)(const Logits& c, void* x, int64_t label);
    void (*logits_gradient)(const Logits& c, void* x, int64_t label, float lse, float scale, float g);
    // one unit of work, of units(attention); workspace: forward_space, backward_space
    void (*attention_forward)(const Attention& a, int64_t unit, float* workspace);
    void (*attention_backward)(const AttentionBackward& x, int64_t unit, float* workspace);
    // eˣ as attention takes it, x ≤ 0: its error has a bound, which is tested
    void (*attention_exp)(const float* x, float* out, int64_t n);
};

// Defined once per instruction set, by table.cpp.
namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace fastlm
