// This instruction set's entry in the table of kernels.
#include "isa.h"

#define FASTLM_QUOTE(x) #x
#define FASTLM_NAME(x) FASTLM_QUOTE(x)

namespace fastlm {
namespace FASTLM_ISA {

void adamw_chunk(Span p, Span g, Span m, Span v, int64_t n, float coefficient, const AdamW& c);
double sum_of_squares_chunk(Span g, int64_t n);
bool unscale_chunk(Span g, int64_t n, float factor);
void rotate_row(const Rotation& row);
void attention_forward(const Attention& a, int64_t unit, float* workspace);
void attention_backward(const AttentionBackward& x, int64_t unit, float* workspace);

extern const Kernels kernels = {FASTLM_NAME(FASTLM_ISA), adamw_chunk, sum_of_squares_chunk, unscale_chunk, rotate_row, attention_forward, attention_backward};

}  // namespace FASTLM_ISA
}  // namespace fastlm
