/*
Tiles of attention: how rows are laid out for the products, which keys a tile of queries sees, and what a score is.

Queries are the lanes of vectors, keys are rows: Sᵀ = K · Qᵀ [keys, queries]. So the softmax runs down a column without
a sum across lanes, keys and values enter as they lie in memory, and one key's bias is one unaligned load of the
diagonals.
*/
#pragma once

#include "attention.h"
#include "matmul.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int LANES = TILE / W;  // vectors in a row of a tile
constexpr int EDGE_LANES = 2;    // an edge tile is taken in parts of so many, each with the keys that it sees

// ---------------------------------------------------------------------------------------------------------------------
// Layouts. `words`: a row's channels one after the other, PAIR in a word. `pairs`: PAIR rows share a word, channel by
// channel. `channels`: the same for a product whose left rows are channels; turned where tiles are multiplied, [D,
// words of TILE].

struct Space {  // a thread's workspace, handed out piece by piece
    float* next;
    FASTLM_INLINE float* take(int64_t n) {
        float* piece = next;
        next += ceil_div(n, 16) * 16;
        return piece;
    }
};

template <class Product>
static FASTLM_INLINE int words_in(int n) {
    return (n + Product::PAIR - 1) / Product::PAIR;
}

static FASTLM_INLINE const char* row_at(const Rows& x, int64_t b, int64_t h, int64_t l) {
    return x.data + b * x.batch + h * x.head + l * x.row;
}

template <typename T>
static inline void widen_rows(float* out, int64_t pitch, const char* x, int64_t stride, int n, int D) {
    for (int r = 0; r < n; r++)
        for (int d = 0; d < D; d++) out[r * pitch + d] = widen(reinterpret_cast<const T*>(x + r * stride)[d]);
}

// n rows of D channels as fp32, `pitch` apart.
static inline void widen_rows(float* out, int64_t pitch, const char* x, int64_t stride, int dtype, int n, int D) {
    switch (dtype) {
        case BF16: return widen_rows<bf16>(out, pitch, x, stride, n, D);
        case F16: return widen_rows<f16>(out, pitch, x, stride, n, D);
        default: return widen_rows<float>(out, pitch, x, stride, n, D);
    }
}

template <typename T>
static inline void narrow_rows(char* out, int64_t stride, const float* x, int64_t pitch, int n, int D, float scale) {
    for (int r = 0; r < n; r++)
        for (int d = 0; d < D; d++) narrow(scale * x[r * pitch + d], reinterpret_cast<T*>(out + r * stride)[d]);
}

// The way back, times scale.
static inline void narrow_rows(
    char* out, int64_t stride, const float* x, int64_t pitch, int dtype, int n, int D, float scale) {
    switch (dtype) {
        case BF16: return narrow_rows<bf16>(out, stride, x, pitch, n, D, scale);
        case F16: return narrow_rows<f16>(out, stride, x, pitch, n, D, scale);
        default: return narrow_rows<float>(out, stride, x, pitch, n, D, scale);
    }
}

// n rows times scale into the dense [.., D] tensor at out, from its row `first` on.
static inline void store_rows(
    char* out, int64_t first, const float* x, int64_t pitch, int dtype, int n, int D, float scale) {
    narrow_rows(out + first * D * size_of(dtype), D * size_of(dtype), x, pitch, dtype, n, D, scale);
}

// n rows as words, words_in(D) apart.
template <class Product>
static inline void load_words(float* out, const char* x, int64_t stride, int dtype, int n, int D) {
    if (Product::PAIR == 1) return widen_rows(out, D, x, stride, dtype, n, D);
    for (int r = 0; r < n; r++) {
        out[(r + 1) * words_in<Product>(D) - 1] = 0.0f;  // an odd channel's partner
        memcpy(out + r * words_in<Product>(D), x + r * stride, 2 * D);
    }
}

// n rows as pairs, pitch apart; a last row without partner is paired with zeros.
template <class Product>
static inline void load_pairs(float* out, int64_t pitch, const char* x, int64_t stride, int dtype, int n, int D) {
    if (Product::PAIR == 1) return widen_rows(out, pitch, x, stride, dtype, n, D);
    for (int r = 0; r < n; r += 2) {
        const uint16_t* first = reinterpret_cast<const uint16_t*>(x + r * stride);
        const uint16_t* second = reinterpret_cast<const uint16_t*>(x + (r + 1) * stride);
        uint32_t* word = reinterpret_cast<uint32_t*>(out + r / 2 * pitch);
        if (r + 1 < n)
            for (int d = 0; d < D; d++) word[d] = first[d] | uint32_t(second[d]) << 16;
        else
            for (int d = 0; d < D; d++) word[d] = first[d];
    }
}

// out [columns, rows] = the transpose of x [rows, columns], four by four; rows and columns beyond the last four one by
// one.
static inline void transpose(float* out, int64_t out_pitch, const float* x, int64_t pitch, int rows, int columns) {
    typedef float Four __attribute__((vector_size(16), may_alias, aligned(4)));
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
        int c = 0;
        for (; c + 4 <= columns; c += 4) {
            const Four x0 = *reinterpret_cast<const Four*>(x + (r + 0) * pitch + c),
                       x1 = *reinterpret_cast<const Four*>(x + (r + 1) * pitch + c);
            const Four x2 = *reinterpret_cast<const Four*>(x + (r + 2) * pitch + c),
                       x3 = *reinterpret_cast<const Four*>(x + (r + 3) * pitch + c);
            for (int e = 0; e < 4; e++)
                *reinterpret_cast<Four*>(out + (c + e) * out_pitch + r) = Four{x0[e], x1[e], x2[e], x3[e]};
        }
        for (; c < columns; c++)
            for (int e = 0; e < 4; e++) out[c * out_pitch + r + e] = x[(r + e) * pitch + c];
    }
    for (; r < rows; r++)
        for (int c = 0; c < columns; c++) out[c * out_pitch + r] = x[r * pitch + c];
}

// n rows as channels.
template <class Product>
static inline void load_channels(float* out, const char* x, int64_t stride, int dtype, int n, int D) {
    if constexpr (!Product::TILES) return load_pairs<Product>(out, D, x, stride, dtype, n, D);
    constexpr int ROWS = 4 * Product::PAIR;
    float words[4 * MAX_D];  // four of each channel
    for (int r = 0; r < n; r += ROWS) {
        const int rows = n - r < ROWS ? n - r : ROWS;
        load_pairs<Product>(words, D, x + r * stride, stride, dtype, rows, D);
        transpose(out + r / Product::PAIR, words_in<Product>(TILE), words, D, words_in<Product>(rows), D);
    }
}

// Channels of the rows from the even one `first` on, as the left operand.
template <class Product>
static FASTLM_INLINE Left channels(const float* x, int first, int D) {
    const int word = first / Product::PAIR;
    return Product::TILES ? Left{x + word, words_in<Product>(TILE), 1} : Left{x + word * D, 1, D};
}

// ---------------------------------------------------------------------------------------------------------------------
// What a score is. This is the place for another term.

struct Scores {
    float scale;
    const float* first_bias;  // bias of the tile's first key for its first query; the next key's lies `step` before
    int64_t step;
    int first, last;  // lanes that see the tile's first key; one more for each further key
    bool full;  // every lane sees every key: nothing to hide
    // with a softcap, which then stands in scale's place: what a product is scaled by under it, and what is added there
    float within;
    const float* met;
    int64_t met_step;

    // Keys, out of n, that any of `lanes` lanes from `lane` on sees; the first one even, so that pairs stay pairs.
    FASTLM_INLINE Range keys_seen(int lane, int lanes, int n) const {
        const int begin = (lane > last ? lane - last : 0) / 2 * 2, end = (lane + lanes - first + 1) / 2 * 2;
        return {begin, end < n ? end : n};
    }

    FASTLM_INLINE V bias(int key, int lane) const { return load(first_bias - key * step + lane); }

    // What takes a product's place in a score where there is a softcap: the part of it that is reached, in [-1, 1].
    FASTLM_INLINE V capped(V product, int key, int lane) const {
        return tanh(fma(product, broadcast(within), load(met - key * met_step + lane)));
    }

    // -∞ where key j of the tile is hidden from the queries at lanes `lane` …
    FASTLM_INLINE V hide(V score, int key, int lane) const {
        Ints at;
        for (int l = 0; l < W; l++) at[l] = l;
        at += lane - key;
        return ((at >= first) & (at <= last)) ? score : broadcast(-__builtin_inff());
    }

    // With terms, -∞ in place of a bias hides a pair, whatever its product: infinity or NaN there is no one's.
    template <bool EDGE, bool TERMS>
    FASTLM_INLINE V operator()(V product, int key, int lane) const {
        const V added = bias(key, lane), score = fma(product, broadcast(scale), added);
        return EDGE ? hide(score, key, lane) : TERMS ? (added == broadcast(-__builtin_inff()) ? added : score) : score;
    }
};

static const float NO_BIAS[TILE] = {};

// Queries i0 …, at most TILE of them up to Lq, of head h with keys j0 … j0 + n - 1.
static inline Scores scores_of(const Attention& a, int64_t h, int64_t i0, int64_t j0, int n) {
    const int64_t i_last = (i0 + TILE < a.Lq ? i0 + TILE : a.Lq) - 1;
    const int64_t first = j0 - a.right - a.offset - i0, last = j0 + a.left - a.offset - i0;
    const auto clamp = [](int64_t x) { return int(x < -4 * TILE ? -4 * TILE : x > 4 * TILE ? 4 * TILE : x); };
    const bool full = first + n - 1 <= 0 && last >= i_last - i0;
    const float* first_bias = a.diagonals ? a.diagonals + h * a.diagonals_size + PAD + i0 - j0 + a.Lk - 1 : NO_BIAS;
    const bool capped = a.softcap != 0.0f;
    return {capped ? a.softcap : a.scale, first_bias, a.diagonals ? 1 : 0, clamp(first), clamp(last), full,
        capped ? a.scale / a.softcap : 0.0f, NO_BIAS, 0};
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
