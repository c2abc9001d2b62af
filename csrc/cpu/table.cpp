// This instruction set's entry in the table of kernels.
#include "vector.h"

#define FASTLM_QUOTE(x) #x
#define FASTLM_NAME(x) FASTLM_QUOTE(x)

// AMX multiplies matrices; kernels that have none are those of the set below it
#if defined(FASTLM_AMX)
#define FASTLM_ELEMENTWISE avx512_bf16
#else
#define FASTLM_ELEMENTWISE FASTLM_ISA
#endif

namespace fastlm {
namespace FASTLM_ELEMENTWISE {

void adamw_chunk(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c);
Squares lamb_moments_chunk(const Parameter& p, Span g, Span m, Span v, int64_t n, float coefficient, const Adam& c);
void lamb_apply_chunk(const Parameter& p, Span m, Span v, int64_t n, const Adam& c);
void sgd_chunk(const Parameter& p, Span g, Span buffer, int64_t n, float coefficient, const Sgd& c);
PanelSums adafactor_measure_panel(const Panel& panel, float coefficient, const Adafactor& c);
double adafactor_bounded_panel(const Panel& panel, float coefficient, const Adafactor& c);
void adafactor_apply_panel(const Panel& panel, float coefficient, const Adafactor& c);
Squares adafactor_measure_run(const Parameter& p, Span g, float* v, int64_t n, float coefficient, const Adafactor& c);
void adafactor_apply_run(
    const Parameter& p, Span g, Span m, const float* v, int64_t n, float coefficient, const Adafactor& c);
double sum_of_squares_chunk(Span g, int64_t n);
bool unscale_chunk(Span g, int64_t n, float factor);
void rotate_row(const Rotation& row);
void norm_rows(const Norm& a, int64_t begin, int64_t end, float* workspace);
void norm_backward_rows(
    const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias, float* workspace);
void gate_rows(const Gate& a, int64_t begin, int64_t end);
void gate_backward_rows(const Gate& a, int64_t begin, int64_t end);
void embedding_backward_rows(const Embedding& a, int64_t begin, int64_t end, float* workspace);
void linear_outputs(const Linear& a, int64_t begin, int64_t end);
RowLoss logits_measure(const Logits& c, void* x, int64_t label);
void logits_gradient(const Logits& c, void* x, int64_t label, float lse, float scale, float g);

}  // namespace FASTLM_ELEMENTWISE

namespace FASTLM_ISA {

using namespace FASTLM_ELEMENTWISE;

void attention_forward(const Attention& a, int64_t unit, float* workspace);
void attention_backward(const AttentionBackward& x, int64_t unit, float* workspace);
void attention_exp(const float* x, float* out, int64_t n);

extern const Kernels kernels = {FASTLM_NAME(FASTLM_ISA), adamw_chunk, lamb_moments_chunk, lamb_apply_chunk, sgd_chunk,
    adafactor_measure_panel, adafactor_bounded_panel, adafactor_apply_panel, adafactor_measure_run, adafactor_apply_run,
    sum_of_squares_chunk, unscale_chunk, rotate_row, norm_rows, norm_backward_rows, gate_rows, gate_backward_rows,
    embedding_backward_rows, linear_outputs, logits_measure, logits_gradient, attention_forward, attention_backward,
    attention_exp};

}  // namespace FASTLM_ISA
}  // namespace fastlm
