/*
The table of CPU kernels that each instruction set fills in. A kernel does one chunk on one thread; threads, lists
and checks are the launchers' (launch.cpp). To add a kernel: an entry here, a file beside this one, a launcher.
*/
#pragma once

#include "../rules/adamw.h"
#include "../rules/numeric.h"
#include "attention.h"

namespace fastlm {

struct Span {  // a run of elements of one tensor
    void* data;
    int dtype;
};

struct Rotation {  // one row [D] of x and of the result, with its angles [R/2]
    const void* x;
    void* out;
    int dtype;
    const float *cos, *sin;
    int D, R;
    bool interleaved;
};

struct Kernels {
    const char* name;
    // p, m, v updated in place from g · coefficient
    void (*adamw)(Span p, Span g, Span m, Span v, int64_t n, float coefficient, const AdamW& c);
    // Σ g² in fp64; not finite when an element is not
    double (*sum_of_squares)(Span g, int64_t n);
    // g ← factor · g; true if an element was not finite before
    bool (*unscale)(Span g, int64_t n, float factor);
    void (*rotate)(const Rotation& row);
    // one unit of work, of units(attention); workspace: forward_space, backward_space
    void (*attention_forward)(const Attention& a, int64_t unit, float* workspace);
    void (*attention_backward)(const AttentionBackward& x, int64_t unit, float* workspace);
};

// Defined once per instruction set, by table.cpp.
namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }

}  // namespace fastlm
