/*
Flash attention, backward (Dao et al. 2022, algorithm 4), probabilities recomputed from lse.

    Pᵀ = exp(Sᵀ - lse)      dSᵀ = Pᵀ ∘ (V gradᵀ - δ)      δ = Σ out ∘ grad - dL/dlse
    dv += Pᵀ grad           dk += dSᵀ q                   dqᵀ += Kᵀ dSᵀ

With a softcap dXᵀ = dSᵀ ∘ (1 - tanh²) takes the place of dSᵀ in dk and dq.

A unit is a few tiles of queries of one head; dq is its own, dk and dv are shared with the other units of the key head
and are added to in turn (turns.h). The table's gradient sums dS over diagonals.
*/
#include "terms.h"
#include "turns.h"

namespace fastlm {

#if defined(__AVX512BF16__)  // products of fp32 are those of the set without any of bf16
namespace avx512 {
void attention_backward(const AttentionBackward& x, int64_t unit, float* workspace);
}
#endif

namespace FASTLM_ISA {

constexpr int PITCH = TILE + 16;  // of dSᵀ in fp32: zeros between rows, for reading along diagonals

struct QueryTile {
    float *q, *grad;              // [words of D, TILE]
    float *q_pairs, *grad_pairs;  // [words of TILE, padded D]
    float* dq;                    // [D, TILE]
    float *lse, *delta;           // [TILE]
    int64_t i0;
    int n;
};

struct KeyTile {
    float *k, *v;                 // [TILE, words of D]
    float* k_pairs;               // [words of TILE, D], as channels
    float *p, *ds;                // [TILE, TILE] and [TILE, PITCH]
    float* dx;                    // like ds, with a softcap: 1 - tanh², then dXᵀ
    float *p_words, *ds_words;    // [TILE, words of TILE]
    float* ds_pairs;              // [words of TILE, TILE]
    float *dk, *dv;               // [n, padded D] in the shared sums
    int64_t j0;
    int n;
};

template <class Product>
static inline void begin_queries(const AttentionBackward& x, QueryTile& t, int64_t b, int64_t h, float* staging) {
    const Attention& a = x.forward;
    const int D = a.D, words = words_in<Product>(D), padded = int(pad_channels(D));
    const Rows out = {a.out, a.H * a.Lq * D * size_of(a.dtype), a.Lq * D * size_of(a.dtype), D * size_of(a.dtype)};
    const char *q = row_at(a.q, b, h, t.i0), *grad = row_at(x.grad, b, h, t.i0);
    for (int i = 0; i < TILE * words; i++) staging[i] = 0.0f;
    load_words<Product>(staging, q, a.q.row, a.dtype, t.n, D);
    transpose(t.q, TILE, staging, words, TILE, words);
    load_words<Product>(staging, grad, x.grad.row, a.dtype, t.n, D);
    transpose(t.grad, TILE, staging, words, TILE, words);
    for (int i = 0; i < words_in<Product>(TILE) * padded; i++) t.q_pairs[i] = t.grad_pairs[i] = 0.0f;
    load_pairs<Product>(t.q_pairs, padded, q, a.q.row, a.dtype, t.n, D);
    load_pairs<Product>(t.grad_pairs, padded, grad, x.grad.row, a.dtype, t.n, D);
    // δ is summed as V gradᵀ is, so that in a row that sees one key, where they are equal, dS is zero to the bit.
    float* out_columns = t.dq;  // which nobody needs yet
    load_words<Product>(staging, row_at(out, b, h, t.i0), out.row, a.dtype, t.n, D);
    transpose(out_columns, TILE, staging, words, TILE, words);
    for (int lane = 0; lane < TILE; lane += W)
        store(t.delta + lane, column_product<Product>(t.grad + lane, out_columns + lane, TILE, words));
    for (int i = 0; i < D * TILE; i++) t.dq[i] = 0.0f;
    const int64_t first = (b * a.H + h) * a.Lq + t.i0;
    for (int i = 0; i < TILE; i++) {
        const float lse = i < t.n ? a.lse[first + i] : -__builtin_inff();
        t.lse[i] = lse == -__builtin_inff() ? -lse : lse;  // exp(S - ∞) = 0: a query that sees nothing, or is not there
        if (x.grad_lse && i < t.n) t.delta[i] -= x.grad_lse[first + i];
    }
}

// P and dS, or dX, as the products after this one take them, for n keys and `lanes` queries.
template <class Product>
static FASTLM_INLINE void narrow_tiles(
    const KeyTile& keys, const float* gradient, int first, int n, int lane, int lanes) {
#if defined(__AVX512BF16__)
    if (Product::PAIR == 1) return;
    for (int j = first; j < first + n; j++)
        for (int i = lane; i < lane + lanes; i += 2 * W) {
            const float *p = keys.p + j * TILE + i, *ds = gradient + j * PITCH + i;
            store(keys.p_words + (j * TILE + i) / 2, narrow_pair(load(p), load(p + W)));
            store(keys.ds_words + (j * TILE + i) / 2, narrow_pair(load(ds), load(ds + W)));
        }
    for (int j = first; j < first + n; j += 2)
        for (int i = lane; i < lane + lanes; i += W) {
            const float* ds = gradient + j * PITCH + i;
            store(keys.ds_pairs + j / 2 * TILE + i, interleave(load(ds), j + 1 < first + n ? load(ds + PITCH) : V{}));
        }
#else
    (void)keys, (void)gradient, (void)first, (void)n, (void)lane, (void)lanes;
#endif
}

// diagonals[x] += Σ dS over the tile's elements with query - key = x, for all x at once in a run of W.
static inline void add_diagonals(const KeyTile& keys, float* diagonals) {
    for (int x = -TILE; x < TILE; x += W) {
        const int begin = -x - W + 1 > 0 ? -x - W + 1 : 0, end = TILE - x < keys.n ? TILE - x : keys.n;
        V sum = {};
        for (int j = begin; j < end; j++) sum += load(keys.ds + j * PITCH + x + j);
        add_to(diagonals + x, sum);
    }
}

// p ← P of the products in p, and dx ← 1 - tanh².
template <bool EDGE, bool TERMS, int LANES>
static inline void cap(const Scores& scores, const float* lse, float* p, float* dx, int first, int n, int lane) {
    for (int j = 0; j < n; j++)
        for (int c = 0; c < LANES; c++) {
            const V part = scores.capped(load(p + j * TILE + c * W), first + j, lane + c * W);
            const V score = scores.operator()<EDGE, TERMS>(part, first + j, lane + c * W);
            store(p + j * TILE + c * W, exp(score - load(lse + lane + c * W)));
            store(dx + j * PITCH + c * W, 1.0f - part * part);
        }
}

// Queries at LANES vectors from `lane` on with the keys seen.begin … seen.end - 1 of the tile.
template <class Product, bool EDGE, bool TERMS, int LANES>
static inline void attend(const Attention& a, QueryTile& t, const KeyTile& keys, const Scores& scores,
    const TermTile& terms, int lane, Range seen) {
    constexpr int PAIR = Product::PAIR;
    constexpr bool WIDE = PAIR == 1;
    const int D = a.D, words = words_in<Product>(D), padded = int(pad_channels(D)), first = int(seen.begin),
              n = int(seen.end) - first;
    const bool capped = a.softcap != 0.0f;
    float *p = keys.p + first * TILE + lane, *ds = keys.ds + first * PITCH + lane, *dq = t.dq + lane;
    float* dx = capped ? keys.dx + first * PITCH + lane : ds;
    const Left k = {keys.k + first * words, words, 1};
    const Right q = {t.q + lane, TILE};
    if (capped) {
        product<Product>(k, q, n, LANES, words, p, TILE);
        cap<EDGE, TERMS, LANES>(scores, t.lse, p, dx, first, n, lane);
    } else {
        matmul<Product>(k, q, n, LANES, words, [&](int j, int c, V product) FASTLM_LAMBDA {
            const V score = scores.operator()<EDGE, TERMS>(product, first + j, lane + c * W);
            store(p + j * TILE + c * W, exp(score - load(t.lse + lane + c * W)));
        });
    }
    matmul<Product>({keys.v + first * words, words, 1}, {t.grad + lane, TILE}, n, LANES, words,
        [&](int j, int c, V product) FASTLM_LAMBDA {
            const V dp = TERMS ? dropped_gradient(a, terms.space, product, j, c * W) : product;
            store(ds + j * PITCH + c * W, load(p + j * TILE + c * W) * (dp - load(t.delta + lane + c * W)));
        });
    for (int j = 0; capped && j < n; j++)
        for (int c = 0; c < LANES; c++) {
            float* at = dx + j * PITCH + c * W;
            store(at, load(at) * load(ds + j * PITCH + c * W));
        }
    if (TERMS) drop<Fma>(a, terms.at, terms.space, p);
    narrow_tiles<Product>(keys, capped ? keys.dx : keys.ds, first, n, lane, LANES * W);

    const Left p_rows = {WIDE ? p : keys.p_words + (first * TILE + lane) / 2, TILE / PAIR, 1};
    const Left dx_rows = {WIDE ? dx : keys.ds_words + (first * TILE + lane) / 2, WIDE ? PITCH : TILE / 2, 1};
    const auto add = [&](const Left& rows, const float* right, float* sum) FASTLM_LAMBDA {
        matmul<Product>(rows, {right + lane / PAIR * padded, padded}, n, padded / W, LANES * W / PAIR,
            [&](int j, int c, V x) FASTLM_LAMBDA { add_to(sum + (first + j) * padded + c * W, x); });
    };
    add(p_rows, t.grad_pairs, keys.dv);
    add(dx_rows, t.q_pairs, keys.dk);
    matmul<Product>(channels<Product>(WIDE ? keys.k : keys.k_pairs, first, D),
        {WIDE ? dx : keys.ds_pairs + first / 2 * TILE + lane, WIDE ? PITCH : TILE}, D, LANES, words_in<Product>(n),
        [&](int d, int c, V x) FASTLM_LAMBDA { add_to(dq + d * TILE + c * W, x); });
}

template <class Product, bool TERMS>
static inline void attend(const Attention& a, QueryTile& t, const KeyTile& keys, const Scores& scores,
    const TermTile& terms, float* diagonals) {
    if (TERMS || scores.full) {
        attend<Product, false, TERMS, LANES>(a, t, keys, scores, terms, 0, {0, keys.n});
    } else {
        for (int j = 0; diagonals && j < keys.n; j++)  // the parts below leave out what no query of theirs sees
            for (int i = 0; i < TILE; i++) keys.ds[j * PITCH + i] = 0.0f;
        for (int lane = 0; lane < t.n; lane += EDGE_LANES * W) {
            const Range seen = scores.keys_seen(lane, EDGE_LANES * W, keys.n);
            if (!seen.empty()) attend<Product, true, false, EDGE_LANES>(a, t, keys, scores, terms, lane, seen);
        }
    }
    if (diagonals) add_diagonals(keys, diagonals);
}

template <class Product, bool TERMS>
static inline void backward(const AttentionBackward& x, int64_t number, float* workspace) {
    const Attention& a = x.forward;
    const int D = a.D, most = query_tiles(D), words = words_in<Product>(D), padded = int(pad_channels(D));
    const Unit unit = unit_of(a, number);
    const int64_t b = unit.b, h = unit.h, h_kv = unit.h_kv;
    Turns turns(x, unit);

    Space space{workspace};
    KeyTile keys = {};
    keys.k = space.take(TILE * words);
    keys.v = space.take(TILE * words);
    keys.k_pairs = space.take(TILE * D);
    keys.p = space.take(TILE * TILE);
    keys.p_words = space.take(TILE * TILE / 2);
    keys.ds_words = space.take(TILE * TILE / 2);
    keys.ds_pairs = space.take(TILE * TILE / 2);
    float* ds = space.take((TILE + 1) * PITCH);
    for (int i = 0; i < (TILE + 1) * PITCH; i++) ds[i] = 0.0f;
    keys.ds = ds + 16;
    if (a.softcap != 0.0f) keys.dx = space.take(TILE * PITCH);
    float* staging = space.take(TILE * padded);
    QueryTile tiles[4];
    int count = 0;
    for (int64_t i0 = unit.block * most * TILE; count < most && i0 < a.Lq; i0 += TILE) {
        QueryTile& t = tiles[count++];
        t.q = space.take(TILE * words);
        t.grad = space.take(TILE * words);
        t.q_pairs = space.take(TILE * padded);
        t.grad_pairs = space.take(TILE * padded);
        t.dq = space.take(TILE * D);
        t.lse = space.take(TILE);
        t.delta = space.take(TILE);
        t.i0 = i0;
        t.n = int(a.Lq - i0 < TILE ? a.Lq - i0 : TILE);
        begin_queries<Product>(x, t, b, h, staging);
    }

    TermSpace terms = {};
    QueryTerms query[4] = {};
    if (TERMS) terms = term_space(space, a);
    for (int t = 0; TERMS && t < count; t++) query[t] = query_terms(a, {b, h, tiles[t].i0, 0, tiles[t].n, 0}, space);
    const Range visited = turns.tiles();
    const int64_t n_keys = keys_seen(a, b, {0, a.Lq}).end;
    for (int64_t tile = visited.begin; tile < visited.end; tile++) {
        keys.j0 = tile * TILE;
        keys.n = int(n_keys - keys.j0 < TILE ? n_keys - keys.j0 : TILE);
        load_words<Product>(keys.k, row_at(a.k, b, h_kv, keys.j0), a.k.row, a.dtype, keys.n, D);
        load_words<Product>(keys.v, row_at(a.v, b, h_kv, keys.j0), a.v.row, a.dtype, keys.n, D);
        if (Product::PAIR == 2)
            load_channels<Product>(keys.k_pairs, row_at(a.k, b, h_kv, keys.j0), a.k.row, a.dtype, keys.n, D);
        const int64_t first = (b * a.Hk + h_kv) * a.Lk + keys.j0;
        keys.dk = x.dk_sum + first * padded;
        keys.dv = x.dv_sum + first * padded;
        bool opens, closes;
        turns.begin(tile, opens, closes);
        if (opens)
            for (int i = 0; i < keys.n * padded; i++) keys.dk[i] = keys.dv[i] = 0.0f;
        float* k_position_sum = TERMS && x.terms.k_position_sum ? x.terms.k_position_sum + first * padded : nullptr;
        for (int i = 0; k_position_sum && opens && i < keys.n * padded; i++) k_position_sum[i] = 0.0f;
        if (TERMS) load_key_terms(a, {b, h, 0, keys.j0, 0, keys.n}, terms);
        for (int t = 0; t < count; t++) {
            const Range mine = keys_seen(a, b, {tiles[t].i0, tiles[t].i0 + tiles[t].n});
            if (mine.begin >= keys.j0 + keys.n || mine.end <= keys.j0) continue;
            float* diagonals =
                x.ddiagonals ? x.ddiagonals + (b * a.H + h) * a.diagonals_size + PAD + tiles[t].i0 - keys.j0 + a.Lk - 1
                             : nullptr;
            Scores scores = scores_of(a, h, tiles[t].i0, keys.j0, keys.n);
            TermTile at = {{b, h, tiles[t].i0, keys.j0, tiles[t].n, keys.n}, terms, query[t], {}};
            if (TERMS && !with_terms(a, at, scores)) continue;
            if (TERMS && a.terms->value_vectors) meet_values(a, at, tiles[t].grad);
            attend<Product, TERMS>(a, tiles[t], keys, scores, at, diagonals);
            if (!TERMS) continue;
            add_bias_gradient(x, at, keys.ds, PITCH);
            if (x.terms.same) add_same_gradient(x, at.at, keys.ds, PITCH);
            if (!has_vectors(*a.terms)) continue;
            add_vector_gradients(x, at, keys.dx ? keys.dx : keys.ds, PITCH, keys.p, tiles[t].grad_pairs, tiles[t].dq,
                k_position_sum ? k_position_sum : keys.dk);
        }
        if (closes) {
            store_rows(x.dk, first, keys.dk, padded, a.dtype, keys.n, D, a.scale);
            store_rows(x.dv, first, keys.dv, padded, a.dtype, keys.n, D, TERMS ? a.terms->kept_scale : 1.0f);
            if (TERMS && k_position_sum && x.terms.k_position)
                store_rows(x.terms.k_position, first, k_position_sum, padded, a.dtype, keys.n, D, a.scale);
        }
        turns.end(tile);
    }
    turns.end();
    for (int t = 0; t < count; t++) {
        transpose(staging, D, tiles[t].dq, TILE, D, tiles[t].n);
        store_rows(x.dq, (b * a.H + h) * a.Lq + tiles[t].i0, staging, D, a.dtype, tiles[t].n, D, a.scale);
        if (!TERMS || !x.terms.q_position || !a.terms->query_vectors) continue;
        transpose(staging, D, query[t].gradient, TILE, D, tiles[t].n);
        store_rows(x.terms.q_position, (b * a.H + h) * a.Lq + tiles[t].i0, staging, D, a.dtype, tiles[t].n, D, a.scale);
    }
}

void attention_backward(const AttentionBackward& x, int64_t unit, float* workspace) {
#if defined(FASTLM_AMX)
    const TileRegisters held;
#endif
#if defined(__AVX512BF16__)
    if (x.forward.dtype == BF16 && !x.forward.terms) return backward<Bf16Dot, false>(x, unit, workspace);
    if (x.forward.dtype == BF16 && !x.forward.terms->value_vectors) return backward<Bf16Dot, true>(x, unit, workspace);
    avx512::attention_backward(x, unit, workspace);
#else
    if (x.forward.terms) return backward<Fma, true>(x, unit, workspace);
    backward<Fma, false>(x, unit, workspace);
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
