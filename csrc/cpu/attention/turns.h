/* Whose turn it is to add to what units of the backward share, so that every sum has one order whatever the number of
threads.

dk and dv of a key head: a unit waits at a tile of keys until as many others have finished the tile as come before it in
the order of units. A bias without rows of its own for the batch or the heads, and distance vectors, are shared by more:
the units that add to the same elements form a chain, in their order, and each stays so many tiles of keys behind the
one before that they never touch the same. Every wait is for a unit of a lower number, and units are begun in that
order, so it is at work. */
#pragma once

#include <sched.h>

#include "attention.h"

namespace fastlm {
namespace FASTLM_ISA {

struct Unit {  // `block` of the queries of head h = h_kv · group + g
    int64_t number, b, h_kv, g, block, h;
};

static inline Unit unit_of(const Attention& a, int64_t number) {
    const int64_t kv_heads = a.B * a.Hk, blocks = query_blocks(a.Lq, a.D), group = a.H / a.Hk;
    Unit u = {
        number, number % kv_heads / a.Hk, number % a.Hk, number / kv_heads / blocks, number / kv_heads % blocks, 0};
    u.h = u.h_kv * group + u.g;
    return u;
}

static inline int64_t number_of(const Attention& a, int64_t b, int64_t h_kv, int64_t g, int64_t block) {
    return ((g * query_blocks(a.Lq, a.D) + block) * a.B + b) * a.Hk + h_kv;
}

// The unit before u among those that add to the same elements of the bias's gradient, or of the vectors'; -1 for the
// first.
static inline int64_t before_in_bias(const AttentionBackward& x, const Unit& u) {
    const Attention& a = x.forward;
    const bool batch = x.terms.bias_sum.batch == 0, heads = x.terms.bias_sum.head == 0;
    if (heads && u.h_kv > 0) return number_of(a, u.b, u.h_kv - 1, u.g, u.block);
    const int64_t h_kv = heads ? a.Hk - 1 : u.h_kv;
    if (batch && u.b > 0) return number_of(a, u.b - 1, h_kv, u.g, u.block);
    return heads && u.g > 0 ? number_of(a, batch ? a.B - 1 : u.b, h_kv, u.g - 1, u.block) : -1;
}

static inline int64_t before_in_vectors(const Attention& a, const Unit& u) {
    if (u.b > 0) return number_of(a, u.b - 1, u.h_kv, u.g, u.block);
    return u.block > 0 ? number_of(a, a.B - 1, u.h_kv, u.g, u.block - 1) : -1;
}

namespace {  // unnamed, so that what is not inlined stays in its file (isa.h)

class Turns {
public:
    Turns(const AttentionBackward& x, const Unit& unit)
        : x(x), a(x.forward), unit(unit), blocks(query_blocks(a.Lq, a.D)) {
        if (!x.progress) return;
        const TermGradients& sums = x.terms;
        if (sums.bias_sum.data) bias = before_in_bias(x, unit);
        if (sums.query_vectors || sums.key_vectors || sums.value_vectors) vectors = before_in_vectors(a, unit);
        // rows by distance that a block's tiles meet with one tile of keys
        behind = unit.b > 0 ? query_tiles(a.D) + 1 : 1;
    }

    Range tiles() const { return turns_of(unit.block); }

    // Wait for the turn at a tile of keys. `first` of all, `last` of all: who is to clear the keys' sums, or to store
    // them.
    void begin(int64_t tile, bool& first, bool& last) {
        int64_t each = 0;  // turns at this tile: of each query head, and before this unit's
        before = 0;
        for (int64_t other = 0; other < blocks; other++) {
            const Range theirs = turns_of(other);
            const bool takes = theirs.begin <= tile && tile < theirs.end;
            each += takes;
            before += takes && other < unit.block;
        }
        before += each * unit.g;
        first = before == 0;
        last = before + 1 == each * (a.H / a.Hk);
        while (__atomic_load_n(finished(tile), __ATOMIC_ACQUIRE) != before) sched_yield();
        wait(bias, tile + 1);
        wait(vectors, tile + behind);
    }

    void end(int64_t tile) {
        if (x.progress) __atomic_store_n(x.progress + unit.number, tile + 1, __ATOMIC_RELEASE);
        __atomic_store_n(finished(tile), before + 1, __ATOMIC_RELEASE);
    }

    // The unit adds no more; so that the next in a chain need ask this one alone, all before it must have ended.
    void end() {
        if (!x.progress) return;
        wait(bias, DONE);
        wait(vectors, DONE);
        __atomic_store_n(x.progress + unit.number, DONE, __ATOMIC_RELEASE);
    }

private:
    static constexpr int64_t DONE = INT64_MAX;

    int64_t* finished(int64_t tile) const {
        return x.finished + (unit.b * a.Hk + unit.h_kv) * ceil_div(a.Lk, TILE) + tile;
    }

    void wait(int64_t other, int64_t tile) const {
        while (other >= 0 && __atomic_load_n(x.progress + other, __ATOMIC_ACQUIRE) < tile) sched_yield();
    }

    Range seen_by(int64_t block) const {
        const int64_t begin = block * query_tiles(a.D) * TILE, end = begin + query_tiles(a.D) * TILE;
        return keys_seen(a, unit.b, {begin, end < a.Lq ? end : a.Lq});
    }

    // Tiles of keys where a block takes its turn: those it sees, and on to the next block's first, so that neighbours
    // meet in one at least, and the order of all that was added before is settled there.
    Range turns_of(int64_t block) const {
        const Range seen = seen_by(block), next = block + 1 < blocks ? seen_by(block + 1) : Range{0, 0};
        if (seen.empty()) return {0, 0};
        const int64_t end = ceil_div(seen.end, TILE), meeting = next.empty() ? 0 : next.begin / TILE + 1;
        return {seen.begin / TILE, end > meeting ? end : meeting};
    }

    const AttentionBackward& x;
    const Attention& a;
    const Unit unit;
    const int64_t blocks;
    int64_t before = 0, bias = -1, vectors = -1, behind = 0;
};

}  // namespace

}  // namespace FASTLM_ISA
}  // namespace fastlm
