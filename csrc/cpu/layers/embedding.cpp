// The gradient of an embedding: for each token the sum of the rows at its places, in their order, by one thread. Most
// tokens are nowhere, and their rows are not touched.
#include "rows.h"

namespace fastlm {
namespace FASTLM_ISA {

// sums ← sums + the rows of up to TOGETHER places; one after the other to each element, whatever they are together
constexpr int TOGETHER = 4;

void embedding_backward_rows(const Embedding& a, int64_t begin, int64_t end, float* workspace) {
    const int D = int(a.D);
    for (int64_t token = begin; token < end; token++) {
        int64_t place = a.begins[token];
        const int64_t last = a.begins[token + 1], o = token * a.D;
        if (place == last) continue;
        float* sums = a.dweight.dtype == F32 ? static_cast<float*>(at(a.dweight.data, F32, o)) : workspace;
        each(D, [&](auto zero, int64_t i) { put(sums + i, zero); });
        const auto row = [&](int slot) {
            return load(a.dy, a.places[place + slot] * a.D, workspace + (1 + slot) * D, D);
        };
        for (; place + TOGETHER <= last; place += TOGETHER) {
            const float *r0 = row(0), *r1 = row(1), *r2 = row(2), *r3 = row(3);
            each(D, [&](auto lane, int64_t i) {
                put(sums + i,
                    (((take(lane, sums + i) + take(lane, r0 + i)) + take(lane, r1 + i)) + take(lane, r2 + i)) +
                        take(lane, r3 + i));
            });
        }
        for (; place < last; place++) {
            const float* r = row(0);
            each(D, [&](auto lane, int64_t i) { put(sums + i, take(lane, sums + i) + take(lane, r + i)); });
        }
        store(sums, a.dweight, o, D);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
