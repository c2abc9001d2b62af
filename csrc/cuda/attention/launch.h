// Launchers of attention, like those of ../launch.h; the op's meaning and shapes are in fastlm/ops/attention.py.
#pragma once

#include <map>
#include <tuple>

#include "../../rules/lists.h"

namespace fastlm {

// (address, shape, strides in elements) of a tensor
using View = std::tuple<Address, std::vector<int64_t>, std::vector<int64_t>>;
using Band = std::tuple<int64_t, int64_t, int64_t>;  // (left, right, offset) of fastlm/masks.py
// address by the name of what a call has besides, dense: table [H, Lq + Lk - 1] fp32; key_lengths, prefix [B],
// q_segments [B, Lq], k_segments [B, Lk] int64
using Terms = std::map<std::string, Address>;

// Bytes of workspace that the launchers ask for, of q's shape [B, H, Lq, D] and k's [B, Hk, Lk, D].
int64_t attention_workspace(const std::vector<int64_t>& q, const std::vector<int64_t>& k, const Terms& terms);
int64_t attention_backward_workspace(
    const std::vector<int64_t>& q, const std::vector<int64_t>& k, const Terms& terms, const Band& band, bool table);

// q, k, v in dtype, fp16 or bf16, channels side by side and rows at multiples of 16 bytes; D a multiple of 8 up to 128;
// scale > 0. Written: out [B, H, Lq, D] in dtype, lse [B, H, Lq] fp32, without gaps.
void launch_attention(const View& q, const View& k, const View& v, int dtype, const Terms& terms, const Band& band,
    double scale, Address out, Address lse, Address workspace, int device, Address stream);

// The op `attention_backward`: grad like q; grad_lse [B, H, Lq] fp32 or 0; dq, dk, dv in dtype; dtable [H, Lq + Lk - 1]
// fp32, or 0 where it is not wanted; all without gaps.
void launch_attention_backward(const View& grad, Address grad_lse, const View& q, const View& k, const View& v,
    int dtype, const Terms& terms, const Band& band, double scale, Address out, Address lse, Address dq, Address dk,
    Address dv, Address dtable, Address workspace, int device, Address stream);

}  // namespace fastlm
