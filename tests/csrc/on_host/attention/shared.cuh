// In place of csrc/cuda/attention/shared.cuh.
#pragma once

#include "../../rules/numeric.h"
#include "shared_memory.h"

namespace fastlm {

using Shared = uint32_t;

inline Shared shared_memory() { return 0; }

struct Two {
    float x[2];
};

inline void count(const char* doing, Shared at, int bytes) {
    together(doing, at, [bytes](Shared* const* parts) {
        uint32_t addresses[32];
        for (int lane = 0; lane < 32; lane++) addresses[lane] = *parts[lane];
        watched::count_conflicts(addresses, bytes);
    });
}

inline float load_shared(Shared at) {
    count("ld.shared", at, 4);
    return as_float(watched::load(at, watched::me()));
}

inline Two load_two(Shared at) {
    count("ld.shared.v2", at, 8);
    watched::at(at, 8);
    return {as_float(watched::load(at, watched::me())), as_float(watched::load(at + 4, watched::me()))};
}

inline void store_two(Shared at, float x, float y) {
    count("st.shared.v2", at, 8);
    watched::at(at, 8);
    watched::store(at, as_bits(x));
    watched::store(at + 4, as_bits(y));
}

}  // namespace fastlm
