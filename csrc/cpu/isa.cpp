// Which instruction set this processor has, best first. Compiled once, for every processor.
#include <stdexcept>

#if defined(FASTLM_HAS_AVX2)
#include <cpuid.h>
#endif
#if defined(FASTLM_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "launch.h"

namespace fastlm {

#if defined(FASTLM_HAS_AVX2)
struct Cpuid {
    unsigned a, b, c, d;
};

// For features that some compiler's __builtin_cpu_supports does not know.
static Cpuid cpuid(unsigned leaf) {
    Cpuid x = {};
    __get_cpuid_count(leaf, 0, &x.a, &x.b, &x.c, &x.d);
    return x;
}

static bool has_avx2() {
    constexpr unsigned F16C = 1u << 29;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (cpuid(1).c & F16C);
}
#endif

#if defined(FASTLM_HAS_AVX512)
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FASTLM_HAS_AVX512_BF16)
static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(FASTLM_HAS_AMX)
// Tiles of bf16, and Linux willing to keep a thread's (XTILEDATA, state 18), which a process must ask for:
// arch_prctl(2), 5.16 or newer.
static bool has_amx() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    const unsigned features = cpuid(7).d;
    return (features & AMX_BF16) && (features & AMX_TILE) && has_avx512_bf16() &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> sets;
#if defined(FASTLM_HAS_AMX)
    if (has_amx()) sets.push_back(&amx::kernels);
#endif
#if defined(FASTLM_HAS_AVX512_BF16)
    if (has_avx512_bf16()) sets.push_back(&avx512_bf16::kernels);
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
