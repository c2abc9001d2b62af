/* Shared memory under watch. A kernel fails where it touches what it did not ask for, reads what nobody has written or
what a copy is still bringing, or where two threads meet in a word, one of them writing, without a barrier of the block
between them; and accesses of a warp that meet in a bank are counted.

Threads of one warp are under the same rule: what they exchange without a barrier is not seen as safe. */
#pragma once

#include <cstring>
#include <deque>

#include "cuda_runtime.h"

namespace watched {

constexpr int NOBODY = -1, MANY = -2;
constexpr int WORD = 4, BANKS = 32;

struct Access {
    int thread = NOBODY;
    long passed = -1;  // barriers of the block that were passed before
};

struct Word {
    uint32_t value;
    bool written = false, awaited = false;  // awaited: a copy is on its way
    Access read, write;
};

struct Copy {
    uint32_t to;
    std::vector<uint32_t> words;
};

inline std::vector<Word> words;
inline std::vector<std::deque<std::vector<Copy>>> groups;  // of each thread: committed ones, and the last being made
extern "C" __attribute__((visibility("default"), weak)) long bank_conflicts = 0;

inline bool now(const Access& access) { return access.passed == block.everyone.passed; }
inline Access mine(int thread) { return {thread, block.everyone.passed}; }
inline int me() { return int(threadIdx.x); }

inline Word& at(uint32_t address, int alignment) {
    if (address % alignment)
        fail("shared memory at " + std::to_string(address) + ", not a multiple of " + std::to_string(alignment));
    if (address / WORD >= words.size())
        fail("shared memory at " + std::to_string(address) + " of " + std::to_string(shared_bytes));
    return words[address / WORD];
}

// reader: a thread, or MANY lanes.
inline uint32_t load(uint32_t address, int reader) {
    Word& word = at(address, WORD);
    if (word.awaited) fail("a race: shared memory is read that a copy is still bringing");
    if (!word.written) fail("shared memory is read that nobody has written");
    if (now(word.write) && word.write.thread != reader)
        fail("a race: shared memory is read without a barrier after its writing");
    const bool others = now(word.read) && word.read.thread != reader;
    word.read = mine(others ? MANY : reader);
    return word.value;
}

inline void claim(Word& word) {
    if (word.awaited) fail("a race: shared memory is written to which a copy is on its way");
    if (now(word.read) && word.read.thread != me())
        fail("a race: shared memory is written without a barrier after its reading");
    if (now(word.write) && word.write.thread != me()) fail("a race: two threads write the same shared memory");
}

inline void store(uint32_t address, uint32_t value) {
    Word& word = at(address, WORD);
    claim(word);
    word.value = value;
    word.written = true;
    word.write = mine(me());
}

// Accesses of `bytes` by each lane: as many lanes at a time as together touch 128 bytes.
inline void count_conflicts(const uint32_t* addresses, int bytes) {
    for (int first = 0, lanes = 128 / bytes; first < 32; first += lanes) {
        std::vector<uint32_t> seen[BANKS];
        size_t most = 1;
        for (int lane = first; lane < std::min(32, first + lanes); lane++)
            for (int b = 0; b < bytes; b += WORD) {
                const uint32_t word = (addresses[lane] + b) / WORD;
                auto& bank = seen[word % BANKS];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        bank_conflicts += long(most) - 1;
    }
}

inline void begin_copy(uint32_t to, const void* from, int bytes) {
    Copy copy = {to, std::vector<uint32_t>(bytes / WORD)};
    if (from) std::memcpy(copy.words.data(), from, bytes);
    at(to, bytes);
    for (int b = 0; b < bytes; b += WORD) {
        Word& word = at(to + b, WORD);
        claim(word);
        word.awaited = true;
    }
    groups[me()].back().push_back(copy);
}

inline void commit() { groups[me()].emplace_back(); }

inline void wait(int pending) {
    auto& own = groups[me()];
    for (; int(own.size()) - 1 > pending; own.pop_front())
        for (const Copy& copy : own.front())
            for (size_t w = 0; w < copy.words.size(); w++) {
                Word& word = words[copy.to / WORD + w];
                word.value = copy.words[w];
                word.awaited = false;
                word.written = true;
                word.write = mine(me());
            }
}

inline const bool watching = [] {
    begin_block = [] {
        words.assign(shared_bytes / WORD, {});
        groups.assign(fibers.size(), std::deque<std::vector<Copy>>(1));
    };
    end_block = [] {
        for (const Word& word : words)
            if (word.awaited) fault = "a copy was not waited for";
    };
    return true;
}();

}  // namespace watched
