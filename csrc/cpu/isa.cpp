// Which instruction set this processor has, best first. Compiled once, for every processor.
#include <stdexcept>

#include "launch.h"

namespace fastlm {

static bool has_avx2() {
#if defined(FASTLM_X86)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

static bool has_avx512() {
#if defined(FASTLM_X86)
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

static bool has_avx512_bf16() {
#if defined(FASTLM_X86)
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

bool has_amx() {
#if defined(FASTLM_X86)
    return __builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> sets;
#if defined(FASTLM_X86)
    if (has_avx512_bf16()) sets.push_back(&avx512_bf16::kernels);
    if (has_avx512()) sets.push_back(&avx512::kernels);
    if (has_avx2()) sets.push_back(&avx2::kernels);
#endif
    sets.push_back(&portable::kernels);
    return sets;
}

static const Kernels*& active_set() {
    static const Kernels* active = available().front();
    return active;
}

const Kernels& active() { return *active_set(); }

void use(const std::string& name) {
    std::string known;
    for (const Kernels* set : available()) {
        if (name == set->name) {
            active_set() = set;
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(set->name);
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one this processor has; choose from " + known);
}

}  // namespace fastlm
