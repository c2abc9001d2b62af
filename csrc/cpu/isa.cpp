// Which instruction set this processor has, best first. Compiled once, for every processor.
#include <stdexcept>

#include "launch.h"

namespace fastlm {

#if defined(FASTLM_HAS_AVX2)
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif

#if defined(FASTLM_HAS_AVX512)
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

bool has_amx() {
#if defined(FASTLM_HAS_AVX512_BF16) && (defined(__clang__) || __GNUC__ >= 12)
    return __builtin_cpu_supports("amx-bf16");
#else
    return false;
#endif
}

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> sets;
#if defined(FASTLM_HAS_AVX512_BF16)
    if (has_avx512() && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::kernels);
#endif
#if defined(FASTLM_HAS_AVX512)
    if (has_avx512()) sets.push_back(&avx512::kernels);
#endif
#if defined(FASTLM_HAS_AVX2)
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
