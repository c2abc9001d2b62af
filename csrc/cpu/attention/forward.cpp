/*
Flash attention, forward (Dao et al. 2022): one pass over the keys with a running softmax (Milakov & Gimelshein 2018).

A unit is a few tiles of queries of one head. For every tile of keys its rows are laid out once, then each tile of
queries takes Sᵀ = K Qᵀ with bias and mask on the way out of registers, P = exp(S - maximum), and Oᵀ ← Oᵀ · rescale + Vᵀ
Pᵀ. A softcap, bias and mask take a pass of their own over Sᵀ.
*/
#include "terms.h"

namespace fastlm {

#if defined(__AVX512BF16__)  // products of fp32 are those of the set without any of bf16
namespace avx512 {
void attention_forward(const Attention& a, int64_t unit, float* workspace);
}
#endif

namespace FASTLM_ISA {

struct QueryTile {
    float* q;             // [words of D, TILE]
    float* o;             // [D, TILE], relative to the maximum
    float *row_max, *sum;     // [TILE] running maximum, and sum of exp(S - maximum)
    int64_t i0;
    int n;
};

struct KeyTile {
    float* k;             // [TILE, words of D]
    float* v;             // [words of TILE, D], as channels
    float *s, *p;         // [TILE, TILE] scores, [words of TILE, TILE] probabilities
    int64_t j0;
    int n;
};

template <class Product>
static inline void begin_queries(const Attention& a, QueryTile& t, int64_t b, int64_t h, float* staging) {
    const int words = words_in<Product>(a.D);
    for (int i = 0; i < TILE * words; i++) staging[i] = 0.0f;
    load_words<Product>(staging, row_at(a.q, b, h, t.i0), a.q.row, a.dtype, t.n, a.D);
    transpose(t.q, TILE, staging, words, TILE, words);
    for (int i = 0; i < a.D * TILE; i++) t.o[i] = 0.0f;
    for (int i = 0; i < TILE; i++) {
        t.row_max[i] = -__FLT_MAX__;
        t.sum[i] = 0.0f;
    }
}

// p ← exp(s - row_max) for n keys, and its column sums.
template <class Product, int LANES>
static FASTLM_INLINE void probabilities(const float* s, float* out, int n, const V (&row_max)[LANES], V (&sum)[LANES]) {
    for (int j = 0; j < n; j += Product::PAIR)
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) {
            V p = exp(load(s + j * TILE + c * W) - row_max[c]);
            sum[c] += p;
#if defined(__AVX512BF16__)
            if (Product::PAIR == 2) {
                V next = {};
                if (j + 1 < n) next = exp(load(s + (j + 1) * TILE + c * W) - row_max[c]);
                sum[c] += next;
                p = interleave(p, next);
            }
#endif
            store(out + j / Product::PAIR * TILE + c * W, p);
        }
}

// s ← scores of the products in s, and the maximum of n keys with them.
template <bool EDGE, bool TERMS, int LANES>
static inline void cap(const Scores& scores, float* s, int first, int n, int lane, V (&row_max)[LANES]) {
    for (int j = 0; j < n; j++)
        for (int c = 0; c < LANES; c++) {
            float* at = s + j * TILE + c * W;
            const V part = scores.capped(load(at), first + j, lane + c * W);
            const V score = scores.operator()<EDGE, TERMS>(part, first + j, lane + c * W);
            row_max[c] = max(score, row_max[c]);
            store(at, score);
        }
}

// Queries at LANES vectors from `lane` on take in the keys seen.begin … seen.end - 1 of the tile.
template <class Product, bool EDGE, bool TERMS, int LANES>
static inline void attend(const Attention& a, QueryTile& t, const KeyTile& keys, const Scores& scores,
    const TermTile& terms, int lane, Range seen) {
    const int words = words_in<Product>(a.D), first = int(seen.begin), n = int(seen.end) - first;
    float *s = keys.s + first * TILE + lane, *p = keys.p + first / Product::PAIR * TILE + lane, *o = t.o + lane;
    V row_max[LANES], sum[LANES], rescale[LANES];
    for (int c = 0; c < LANES; c++) {
        row_max[c] = load(t.row_max + lane + c * W);
        sum[c] = V{};
    }
    const Left k = {keys.k + first * words, words, 1};
    const Right q = {t.q + lane, TILE};
    if (a.softcap != 0.0f) {
        product<Product>(k, q, n, LANES, words, s, TILE);
        cap<EDGE, TERMS>(scores, s, first, n, lane, row_max);
    } else {
        matmul<Product>(k, q, n, LANES, words, [&](int j, int c, V product) FASTLM_LAMBDA {
            const V score = scores.operator()<EDGE, TERMS>(product, first + j, lane + c * W);
            row_max[c] = max(score, row_max[c]);
            store(s + j * TILE + c * W, score);
        });
    }
    for (int c = 0; c < LANES; c++) {
        rescale[c] = exp(load(t.row_max + lane + c * W) - row_max[c]);
        store(t.row_max + lane + c * W, row_max[c]);
    }
    probabilities<Product>(s, p, n, row_max, sum);
    if (TERMS) drop<Product>(a, terms.at, terms.space, p);
    for (int c = 0; c < LANES; c++) store(t.sum + lane + c * W, fma(load(t.sum + lane + c * W), rescale[c], sum[c]));
    matmul<Product>(channels<Product>(keys.v, first, a.D), {p, TILE}, a.D, LANES, words_in<Product>(n),
        [&](int d, int c, V x)
            FASTLM_LAMBDA { store(o + d * TILE + c * W, fma(load(o + d * TILE + c * W), rescale[c], x)); });
    if (TERMS && a.terms->value_vectors) add_values(a, terms, p, o);
}

template <class Product, bool TERMS>
static inline void attend(
    const Attention& a, QueryTile& t, const KeyTile& keys, const Scores& scores, const TermTile& terms) {
    if (TERMS || scores.full) return attend<Product, false, TERMS, LANES>(a, t, keys, scores, terms, 0, {0, keys.n});
    for (int lane = 0; lane < t.n; lane += EDGE_LANES * W) {
        const Range seen = scores.keys_seen(lane, EDGE_LANES * W, keys.n);
        if (!seen.empty()) attend<Product, true, false, EDGE_LANES>(a, t, keys, scores, terms, lane, seen);
    }
}

// out = o / sum, and lse; a query that saw nothing gets zeros and -∞.
static inline void end_queries(const Attention& a, const QueryTile& t, int64_t bh, float* staging) {
    for (int i = 0; i < TILE; i++) {
        const bool nothing = t.sum[i] == 0.0f;
        if (i < t.n)
            a.lse[bh * a.Lq + t.i0 + i] = nothing ? -__builtin_inff() : t.row_max[i] + __builtin_logf(t.sum[i]);
        t.sum[i] = nothing ? 0.0f : (a.terms ? a.terms->kept_scale : 1.0f) / t.sum[i];
    }
    for (int d = 0; d < a.D; d++)
        for (int i = 0; i < TILE; i++) t.o[d * TILE + i] *= t.sum[i];
    transpose(staging, a.D, t.o, TILE, a.D, t.n);
    const int64_t row = a.D * size_of(a.dtype);
    narrow_rows(a.out + (bh * a.Lq + t.i0) * row, row, staging, a.D, a.dtype, t.n, a.D, 1.0f);
}

template <class Product, bool TERMS>
static inline void forward(const Attention& a, int64_t unit, float* workspace) {
    const int D = a.D, most = query_tiles(D);
    const int64_t blocks = query_blocks(a.Lq, D), bh = unit / blocks, b = bh / a.H, h = bh % a.H;
    // under a causal mask the last queries have most to do
    const int64_t start = (blocks - 1 - unit % blocks) * most * TILE;
    Space space{workspace};
    KeyTile keys = {space.take(TILE * D), space.take(TILE * D), space.take(TILE * TILE), space.take(TILE * TILE), 0, 0};
    QueryTile tiles[4];
    int count = 0;
    for (int64_t i0 = start; count < most && i0 < a.Lq; i0 += TILE) {
        tiles[count] = {space.take(TILE * D), space.take(TILE * D), space.take(TILE), space.take(TILE), i0,
            int(a.Lq - i0 < TILE ? a.Lq - i0 : TILE)};
        begin_queries<Product>(a, tiles[count++], b, h, keys.k);
    }
    TermSpace terms = {};
    QueryTerms query[4] = {};
    if (TERMS) terms = term_space(space, a);
    for (int t = 0; TERMS && t < count; t++) query[t] = query_terms(a, {b, h, tiles[t].i0, 0, tiles[t].n, 0}, space);
    const int64_t h_kv = h / (a.H / a.Hk);
    const Range seen = keys_seen(a, b, {start, tiles[count - 1].i0 + tiles[count - 1].n});
    for (keys.j0 = seen.begin; keys.j0 < seen.end; keys.j0 += TILE) {
        keys.n = int(seen.end - keys.j0 < TILE ? seen.end - keys.j0 : TILE);
        load_words<Product>(keys.k, row_at(a.k, b, h_kv, keys.j0), a.k.row, a.dtype, keys.n, D);
        load_channels<Product>(keys.v, row_at(a.v, b, h_kv, keys.j0), a.v.row, a.dtype, keys.n, D);
        if (TERMS) load_key_terms(a, {b, h, 0, keys.j0, 0, keys.n}, terms);
        for (int t = 0; t < count; t++) {
            const Range mine = keys_seen(a, b, {tiles[t].i0, tiles[t].i0 + tiles[t].n});
            if (mine.begin >= keys.j0 + keys.n || mine.end <= keys.j0) continue;
            Scores scores = scores_of(a, h, tiles[t].i0, keys.j0, keys.n);
            TermTile at = {{b, h, tiles[t].i0, keys.j0, tiles[t].n, keys.n}, terms, query[t], {}};
            if (TERMS && !with_terms(a, at, scores)) continue;
            attend<Product, TERMS>(a, tiles[t], keys, scores, at);
        }
    }
    for (int t = 0; t < count; t++) end_queries(a, tiles[t], bh, keys.k);
}

void attention_forward(const Attention& a, int64_t unit, float* workspace) {
#if defined(FASTLM_AMX)
    const TileRegisters held;
#endif
#if defined(__AVX512BF16__)
    if (a.dtype == BF16 && !a.terms) return forward<Bf16Dot, false>(a, unit, workspace);
    if (a.dtype == BF16 && !a.terms->value_vectors) return forward<Bf16Dot, true>(a, unit, workspace);
    avx512::attention_forward(a, unit, workspace);
#else
    if (a.terms) return forward<Fma, true>(a, unit, workspace);
    forward<Fma, false>(a, unit, workspace);
#endif
}

void attention_exp(const float* x, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        V lanes = {};
        const int count = n - i < W ? int(n - i) : W;
        memcpy(&lanes, x + i, sizeof(float) * count);
        lanes = exp(lanes);
        memcpy(out + i, &lanes, sizeof(float) * count);
    }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
