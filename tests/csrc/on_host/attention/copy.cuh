/* In place of csrc/cuda/attention/copy.cuh. What a copy brings is there when its thread waits for it, and no sooner;
until then nobody may look. */
#pragma once

#include "shared.cuh"

namespace fastlm {

inline void copy_async(Shared to, const void* from, bool there) {
    if (there && reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from an address that is not a multiple of 16");
    if (there) check_read(from, 16);
    count("cp.async", to, 16);
    watched::begin_copy(to, there ? from : nullptr, 16);
}

inline void copy_async(Shared to, const float* from) {
    check_read(from, 4);
    count("cp.async", to, 4);
    watched::begin_copy(to, from, 4);
}

inline void commit_copies() { watched::commit(); }

template <int PENDING>
void wait_for_copies() {
    watched::wait(PENDING);
}

}  // namespace fastlm
