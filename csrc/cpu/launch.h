/* Launchers: they check what came from Python, cut lists of tensors into chunks, and share the chunks among threads.
Results do not depend on the number of threads: every chunk is computed whole by one thread, and partial sums are added
in chunk order. */
#pragma once

#include <array>
#include <map>
#include <tuple>

#include "../rules/lists.h"
#include "kernels.h"

namespace fastlm {

std::vector<const Kernels*> available();  // the sets this processor has, best first
const Kernels& active();
void use(const std::string& name);  // throws std::invalid_argument for a set it lacks

// (address, shape, strides in elements) of a tensor
using View = std::tuple<Address, std::vector<int64_t>, std::vector<int64_t>>;
// (view, dtype) by the names of fastlm/ops/attention.py
using TermViews = std::map<std::string, std::pair<View, int>>;
using Operands = std::map<std::string, std::pair<Address, int>>;  // (address, dtype) of dense tensors, by name
// (probability, threshold of a word, seed, number of the first query, and of the first key)
using Dropout = std::tuple<double, uint64_t, uint64_t, int64_t, int64_t>;
using Band = std::tuple<int64_t, int64_t, int64_t>;       // (left, right, offset) of fastlm/masks.py

// The ops of fastlm/ops/optim/adamw.py, lamb.py, sgd.py and adafactor.py: the update, what is asked about each
// parameter's size, the optimizer's own states, its options, and where to work.

void launch_adamw(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, int threads);

void launch_lamb(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, const RatioOptions& ratio, int threads);

// buffers: empty without momentum.
void launch_sgd(
    const Update& update, const Sizes& sizes, const Tensors& buffers, const SgdOptions& options, int threads);

// rows, columns: fp32, the factors [matrices, rows], [matrices, columns] of each tensor; for one that is not factored,
// rows holds its whole average of squares. m: empty without momentum.
void launch_adafactor(const Update& update, const Shapes& shapes, const Addresses& rows, const Addresses& columns,
    const Tensors& m, const AdafactorOptions& options, int threads);

// stats: three fp32: [norm of g/scale, the factor that unscales and clips, found_inf]. scale: fp32 scalar or 0.
// max_norm ≤ 0: no clipping.
void launch_grad_stats(
    const Tensors& g, const Sizes& sizes, Address scale, double max_norm, Address stats, int threads);

// g ← g · factor; found_inf is set to 1 if an element was not finite, else left as it is.
void launch_unscale(const Tensors& g, const Sizes& sizes, Address factor, Address found_inf, int threads);

// x, out [B, H, L, D]: strides in elements, the last one 1. cos, sin [B or 1, L, R/2] dense; angle_stride: elements
// between rows of a batch, 0 to share.
void launch_rotate(Address x, Address out, int dtype, const std::vector<int64_t>& shape,
    const std::vector<int64_t>& x_strides, const std::vector<int64_t>& out_strides, Address cos, Address sin,
    int64_t angle_stride, int R, bool interleaved, int threads);

// The ops of fastlm/ops/norm.py, layer_norm where centred: tensors by the names there. statistics, fp32: rows of mean
// where centred, then of rstd.
void launch_norm(const Operands& tensors, Address statistics, bool centred, int64_t rows, int64_t D, double eps,
    double weight_offset, bool rounds_first, int threads);

// dweight, dbias [D] fp32, or 0.
void launch_norm_backward(const Operands& tensors, Address statistics, bool centred, int64_t rows, int64_t D,
    double weight_offset, Address dweight, Address dbias, int threads);

// The ops of fastlm/ops/gate.py: x and y; backward: x, dy and dx, by name. activation: a number of kernels.h.
void launch_gate(const Operands& tensors, int64_t rows, int64_t H, int activation, bool gated, int threads);
void launch_gate_backward(const Operands& tensors, int64_t rows, int64_t H, int activation, bool gated, int threads);

// The gradient of fastlm/ops/embedding.py: dy [n, D] and dweight [tokens, D], zeros before, by name; ids [n] int64.
// padding: a token whose row stays so, or -1.
void launch_embedding_backward(
    const Operands& tensors, Address ids, int64_t n, int64_t tokens, int64_t D, int64_t padding, int threads);

// The op of fastlm/ops/linear.py: x [rows, K], weight [N, K], bias [N] or not, and y [rows, N], by name.
void launch_linear(const Operands& tensors, int64_t rows, int64_t K, int64_t N, int threads);

// What fastlm/ops/linear_cross_entropy.py needs of products x [rows, V], each row's side by side: lse and wanted; then,
// in their place, the gradient of scale · lse - g · wanted; or both at once for the loss of each row, all of which have
// a label. bias [V] fp32 or 0; labels [rows] int64; made: lse and wanted, given: lse, scale and g, loss [rows] fp32
// each. words: V of all ranks. options: softcap, temperature, smoothing.
void launch_logits_measure(const View& x, int dtype, Address bias, Address labels, const std::array<Address, 2>& made,
    int64_t words, const std::array<double, 3>& options, int threads);
void launch_logits_gradient(const View& x, int dtype, Address bias, Address labels, const std::array<Address, 3>& given,
    int64_t words, const std::array<double, 3>& options, int threads);
void launch_logits_lose(const View& x, int dtype, Address bias, Address labels, Address loss, int64_t words,
    const std::array<double, 3>& options, double z_loss, int threads);

// The op `attention` of fastlm/ops/attention.py. q [B, H, Lq, D]; k, v [B, Hk, Lk, D]: channels side by side. table [H,
// Lq + Lk - 1] fp32 or 0; key_lengths [B] int64 or 0. terms: the op's other tensors by name; ids are int64 and `same`
// fp32, both dense, the rest lie as their strides say. Written: out [B, H, Lq, D] in dtype, lse [B, H, Lq] fp32. Dense
// where no strides are given. D is at most 256; softcap is 0 for none.
void launch_attention(const View& q, const View& k, const View& v, int dtype, Address table, Address key_lengths,
    const TermViews& terms, const Dropout& dropout, const Band& band, double scale, double softcap, Address out,
    Address lse, int threads);

// The op `attention_backward`: grad like q; grad_lse [B, H, Lq] fp32 or 0; dq, dk, dv dense, in dtype; dtable [H, Lq +
// Lk - 1] fp32 or 0; term_gradients: dense, by the names of those wanted, in their terms' dtypes and shapes, zeros
// before.
void launch_attention_backward(const View& grad, Address grad_lse, const View& q, const View& k, const View& v,
    int dtype, Address table, Address key_lengths, const TermViews& terms, const Dropout& dropout, const Band& band,
    double scale, double softcap, Address out, Address lse, Address dq, Address dk, Address dv, Address dtable,
    const std::map<std::string, Address>& term_gradients, int threads);

}  // namespace fastlm
