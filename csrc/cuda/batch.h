/* How lists of tensors reach a kernel: as one kernel argument. Nothing is uploaded, allocated or waited for, and a CUDA
graph keeps its own copy.

Since CUDA 12.1 an argument may have 32,764 bytes, hundreds of tensors, so a model takes one launch or a few. Tensors
are cut into chunks of CHUNK elements and every block of threads does one; `first` counts the chunks before each tensor,
and a block finds its tensor by bisection, the same for all its threads. This file is host and device code without a
line of CUDA in it, so that tests can run it under sanitizers. */
#pragma once

#include <algorithm>

#include "../rules/lists.h"

namespace fastlm {

// elements: enough to hide a block's start, few enough to keep every processor busy to the end
constexpr int64_t CHUNK = 16384;
constexpr int VECTOR = 4;  // elements moved as one: 16 bytes of fp32, 8 of a 16-bit type
constexpr int ARGUMENT_BYTES = 32764;  // all arguments of a kernel; nvcc refuses one byte more
constexpr int OTHER_ARGUMENT_BYTES = 64;  // of which these are for what goes along with the lists

template <int LISTS>
struct Batch {
    static_assert(2 * LISTS <= 16, "two bits for each list must fit a tensor's dtypes");
    // address, size, first, dtypes; and the other members
    static constexpr int CAPACITY = (ARGUMENT_BYTES - OTHER_ARGUMENT_BYTES - 24) / (8 * LISTS + 8 + 4 + 2);
    char* data[LISTS][CAPACITY];  // pointers, not integers: the compiler then knows that they point into global memory
    int64_t size[CAPACITY];
    int64_t chunks_before;  // in earlier batches
    uint32_t first[CAPACITY + 1];  // the chunks of tensor t are first[t] … first[t + 1] - 1
    int tensors, tensors_before;
    uint16_t dtypes[CAPACITY];  // two bits for each list
};

template <int LISTS>
struct Chunk {  // n elements that start at data[l] in each list
    void* data[LISTS];
    int dtype[LISTS];
    int n;
    int64_t tensor, index;  // counted over all batches
    int64_t begin;  // the first element's number in its tensor
};

// The tensor, of n, that has piece `index`: the last one that starts at or before it, by bisection. first(t): how many
// pieces are before tensor t. Empty tensors, which share their start with the next one, are passed over.
template <typename First>
FASTLM_RULE int tensor_at(uint32_t index, int n, const First& first) {
    int low = 0, high = n;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first(middle) <= index) low = middle;
        else high = middle;
    }
    return low;
}

template <int LISTS>
FASTLM_RULE Chunk<LISTS> chunk_at(const Batch<LISTS>& batch, uint32_t chunk) {
    const int t = tensor_at(chunk, batch.tensors, [&](int middle) { return batch.first[middle]; });
    const int64_t begin = int64_t(chunk - batch.first[t]) * CHUNK, left = batch.size[t] - begin;
    Chunk<LISTS> c;
    for (int l = 0; l < LISTS; l++) {
        c.dtype[l] = (batch.dtypes[t] >> (2 * l)) & 3;
        c.data[l] = batch.data[l][t] + begin * element_size(c.dtype[l]);
    }
    c.n = int(left < CHUNK ? left : CHUNK);
    c.tensor = batch.tensors_before + t;
    c.index = batch.chunks_before + chunk;
    c.begin = begin;
    return c;
}

constexpr unsigned ANY = ~0u;  // dtypes that tensors do not share, or that are not known when a kernel is compiled

// dtypes, list by list, as a batch has them.
template <typename... Dtypes>
constexpr unsigned packed(Dtypes... dtypes) {
    unsigned all = 0;
    int list = 0;
    ((all |= unsigned(dtypes) << 2 * list++), ...);
    return all;
}

// The dtypes of all tensors of a batch, or ANY.
template <int LISTS>
unsigned dtypes_of(const Batch<LISTS>& batch) {
    const auto end = batch.dtypes + batch.tensors;
    return std::all_of(batch.dtypes, end, [&](uint16_t dtypes) { return dtypes == batch.dtypes[0]; }) ? batch.dtypes[0]
                                                                                                      : ANY;
}

// The chunk, with dtypes that are constants unless they are ANY.
template <unsigned DTYPES, int LISTS>
FASTLM_RULE Chunk<LISTS> with_dtypes(Chunk<LISTS> c) {
    if constexpr (DTYPES != ANY)
        for (int l = 0; l < LISTS; l++) c.dtype[l] = (DTYPES >> 2 * l) & 3;
    return c;
}

// Whether every list can be read VECTOR elements at a time from the chunk's start.
template <int LISTS>
FASTLM_RULE bool aligned(const Chunk<LISTS>& c) {
    bool all = true;
    for (int l = 0; l < LISTS; l++)
        all &= reinterpret_cast<Address>(c.data[l]) % (VECTOR * element_size(c.dtype[l])) == 0;
    return all;
}

static inline int64_t chunks_of(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

static inline int64_t chunks_of(const Sizes& sizes) {
    int64_t sum = 0;
    for (int64_t size : sizes) sum += chunks_of(size);
    return sum;
}

// Pack the lists into as few batches as hold them, in order, and call launch(batch, number of chunks) for each that has
// work.
template <int LISTS, typename Launch>
void for_each_batch(const Tensors* const (&lists)[LISTS], const Sizes& sizes, const Launch& launch) {
    Batch<LISTS> batch;
    int64_t chunks_before = 0;
    for (size_t begin = 0; begin < sizes.size(); begin += Batch<LISTS>::CAPACITY) {
        batch.tensors = int(std::min<size_t>(Batch<LISTS>::CAPACITY, sizes.size() - begin));
        batch.tensors_before = int(begin);
        batch.chunks_before = chunks_before;
        batch.first[0] = 0;
        for (int t = 0; t < batch.tensors; t++) {
            batch.size[t] = sizes[begin + t];
            batch.first[t + 1] = batch.first[t] + uint32_t(chunks_of(batch.size[t]));
            batch.dtypes[t] = 0;
            for (int l = 0; l < LISTS; l++) {
                const auto [address, dtype] = (*lists[l])[begin + t];
                batch.data[l][t] = reinterpret_cast<char*>(address);
                batch.dtypes[t] |= uint16_t(dtype << (2 * l));
            }
        }
        const uint32_t chunks = batch.first[batch.tensors];
        if (chunks > 0) launch(batch, chunks);
        chunks_before += chunks;
    }
}

}  // namespace fastlm
