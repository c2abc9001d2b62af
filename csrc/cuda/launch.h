/* Launchers of the CUDA kernels: they check what came from Python and put work on a stream of a device. They neither
wait nor allocate, so a CUDA graph can capture them, after one run outside it: CUDA loads a kernel at its first launch.

Arguments are those of csrc/cpu/launch.h; addresses are the device's; in place of the number of threads come a workspace
where one is needed, the device's index and the stream's address. Errors throw std::invalid_argument for arguments,
std::runtime_error with CUDA's own name for what CUDA refused. */
#pragma once

#include "../rules/adafactor.h"
#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "batch.h"

namespace fastlm {

// Bytes of workspace that a launcher asks for. What it holds before and after is nobody's concern.
int64_t adamw_workspace(const Sizes& sizes);
int64_t lamb_workspace(const Sizes& sizes);
int64_t sgd_workspace(const Sizes& sizes);
int64_t adafactor_workspace(const Shapes& shapes);
int64_t grad_stats_workspace(const Sizes& sizes);

void launch_adamw(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, Address workspace, int device, Address stream);

void launch_lamb(const Update& update, const Sizes& sizes, const Tensors& m, const Tensors& v,
    const AdamOptions& options, const RatioOptions& ratio, Address workspace, int device, Address stream);

void launch_sgd(const Update& update, const Sizes& sizes, const Tensors& buffers, const SgdOptions& options,
    Address workspace, int device, Address stream);

void launch_adafactor(const Update& update, const Shapes& shapes, const Addresses& rows, const Addresses& columns,
    const Tensors& m, const AdafactorOptions& options, Address workspace, int device, Address stream);

void launch_grad_stats(const Tensors& g, const Sizes& sizes, Address scale, double max_norm, Address stats,
    Address workspace, int device, Address stream);

void launch_unscale(
    const Tensors& g, const Sizes& sizes, Address factor, Address found_inf, int device, Address stream);

}  // namespace fastlm
