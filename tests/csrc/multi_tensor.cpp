// Runs the host and device code of csrc/cuda (batch.h, map.h, parameter.h, squares.h) on the host, under sanitizers.
// Prints the first failure.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>

#include "../../csrc/cuda/map.h"
#include "../../csrc/cuda/parameter.h"
#include "../../csrc/cuda/squares.h"

using namespace fastlm;

#define REQUIRE(x) \
    if (!(x)) std::printf("multi_tensor.cpp:%d: %s does not hold\n", __LINE__, #x), std::exit(1)

static const Address BASE = Address(1) << 40;  // tensors lie far apart; nothing is read

template <int LISTS>
static void chunks_cover_every_element_once(const Sizes& sizes) {
    std::vector<Tensors> lists(LISTS);
    for (int l = 0; l < LISTS; l++)
        for (size_t t = 0; t < sizes.size(); t++)
            lists[l].push_back({sizes[t] ? BASE * (t + 1) + 64 * l : 0, int(t + l) % 3});
    const Tensors* pointers[LISTS];
    for (int l = 0; l < LISTS; l++) pointers[l] = &lists[l];
    // the next chunk must be this one, of this tensor, after so many of its elements
    int64_t index = 0, tensor = 0, done = 0;
    for_each_batch(pointers, sizes, [&](const Batch<LISTS>& batch, uint32_t chunks) {
        REQUIRE(sizeof(batch) + OTHER_ARGUMENT_BYTES <= ARGUMENT_BYTES);
        for (uint32_t i = 0; i < chunks; i++) {
            const Chunk<LISTS> c = chunk_at(batch, i);
            while (done == sizes[tensor]) tensor++, done = 0;
            REQUIRE(c.tensor == tensor && c.index == index++);
            REQUIRE(c.n == std::min(CHUNK, sizes[tensor] - done) && c.begin == done);
            for (int l = 0; l < LISTS; l++) {
                REQUIRE(c.dtype[l] == lists[l][tensor].second);
                REQUIRE(
                    reinterpret_cast<Address>(c.data[l]) == lists[l][tensor].first + done * element_size(c.dtype[l]));
            }
            done += c.n;
        }
    });
    while (tensor < int64_t(sizes.size()) && done == sizes[tensor]) tensor++, done = 0;
    REQUIRE(tensor == int64_t(sizes.size()) && index == chunks_of(sizes));
}

static void cover() {
    std::mt19937 random(0);
    std::vector<Sizes> all = {{}, {0}, {1}, {CHUNK}, {CHUNK + 1}, {0, 0, 5, 0}, {0, CHUNK, 0, 0, 3 * CHUNK - 1, 0},
        {(int64_t(1) << 31) + 7, 1}};
    for (int trial = 0; trial < 50; trial++) {
        Sizes sizes(random() % 3000);
        for (int64_t& size : sizes) size = random() % 4 ? random() % (5 * CHUNK) : 0;
        all.push_back(sizes);
    }
    for (const Sizes& sizes : all) {
        chunks_cover_every_element_once<1>(sizes), chunks_cover_every_element_once<4>(sizes);
        chunks_cover_every_element_once<5>(sizes);  // p, its master, g, m, v
    }
}

// A batch says which dtypes all of its tensors have, and a kernel for these has them as constants.
static void known_dtypes() {
    for (int odd : {-1, 0, 1, 2}) {
        Tensors p(3, {BASE, BF16}), m(3, {BASE, F32});
        if (odd >= 0) m[odd].second = F16;
        for_each_batch({&p, &m}, {1, 2, 3}, [&](const Batch<2>& batch, uint32_t) {
            REQUIRE(dtypes_of(batch) == (odd < 0 ? packed(BF16, F32) : ANY));
            const Chunk<2> c = chunk_at(batch, 1), other = with_dtypes<packed(F16, BF16)>(c);
            REQUIRE(with_dtypes<ANY>(c).dtype[1] == c.dtype[1] && other.dtype[0] == F16 && other.dtype[1] == BF16);
        });
    }
}

static void alignment() {
    Chunk<2> c{};
    c.dtype[0] = F32;
    c.dtype[1] = BF16;
    for (Address a = 0; a < 32; a += 4)
        for (Address b = 0; b < 32; b += 2) {
            c.data[0] = reinterpret_cast<void*>(BASE + a);
            c.data[1] = reinterpret_cast<void*>(BASE + b);
            REQUIRE(aligned(c) == (a % 16 == 0 && b % 8 == 0));
        }
}

// n elements, `shift` elements past an aligned address; reading or writing one more is an error that the sanitizer sees
struct Tensor {
    Tensor(int n, int dtype, int shift) : memory(new char[(n + shift) * element_size(dtype)]), dtype(dtype) {
        data = memory.get() + shift * element_size(dtype);
    }
    float get(int i) const {
        if (dtype == F32) return reinterpret_cast<const float*>(data)[i];
        return dtype == BF16 ? widen(reinterpret_cast<const bf16*>(data)[i])
                             : widen(reinterpret_cast<const f16*>(data)[i]);
    }
    void set(int i, float x) {
        if (dtype == F32) reinterpret_cast<float*>(data)[i] = x;
        if (dtype == BF16) narrow(x, reinterpret_cast<bf16*>(data)[i]);
        if (dtype == F16) narrow(x, reinterpret_cast<f16*>(data)[i]);
    }
    std::unique_ptr<char[]> memory;
    char* data;
    int dtype;
};

// a ← a + 2b and c ← -c on small integers, which every dtype holds; b is not written.
template <int FLIGHT>
static void every_element_is_mapped_once(int n, int mix, int shift) {
    Tensor a(n, mix % 3, shift % 4), b(n, mix / 3 % 3, shift / 4 % 4), c(n, mix / 9, shift / 16);
    for (int i = 0; i < n; i++) {
        a.set(i, i % 50);
        b.set(i, i % 70);
        c.set(i, i % 90);
    }
    const Chunk<3> chunk{{a.data, b.data, c.data}, {a.dtype, b.dtype, c.dtype}, n, 0, 0, 0};
    for (int thread = 0; thread < THREADS; thread++)
        map<0b101, FLIGHT>(chunk, thread, [](float (&x)[3][VECTOR], int) {
            for (int e = 0; e < VECTOR; e++) x[0][e] += 2 * x[1][e], x[1][e] = 77, x[2][e] = -x[2][e];
        });
    for (int i = 0; i < n; i++)
        REQUIRE(a.get(i) == i % 50 + 2 * (i % 70) && b.get(i) == i % 70 && c.get(i) == -(i % 90));
}

static void mapping() {
    for (int n : {1, 3, 4, 5, 1023, 1024, 1027, 4096, 5555, int(CHUNK)})
        for (int mix = 0; mix < 27; mix++)
            for (int shift : {0, 1, 16, 63})
                every_element_is_mapped_once<1>(n, mix, shift), every_element_is_mapped_once<4>(n, mix, shift);
}

// Each thread sees the same vectors in the same order, aligned or not: a norm does not depend on where the gradient
// lies.
static void order() {
    for (int n : {1, 6, 1030, 5555}) {
        std::vector<std::vector<float>> seen[2];
        for (int shift : {0, 1}) {
            Tensor a(n, F32, shift);
            for (int i = 0; i < n; i++) a.set(i, i + 1);
            for (int thread = 0; thread < THREADS; thread++) {
                seen[shift].emplace_back();
                map<0, 4>(Chunk<1>{{a.data}, {F32}, n, 0, 0, 0}, thread, [&](float (&x)[1][VECTOR], int) {
                    if (x[0][0] != 0) seen[shift].back().insert(seen[shift].back().end(), x[0], x[0] + VECTOR);
                });
            }
        }
        REQUIRE(seen[0] == seen[1]);
    }
}

// A parameter goes up by a third: what is stored is what rules/philox.h makes of each element by itself.
template <Precision PRECISION>
static void parameters_are_kept(int n, int dtype, int master_dtype, int64_t begin) {
    Tensor p(n, dtype, 0), master(n, master_dtype, 0);
    const auto low = [&](int i) -> int16_t& { return reinterpret_cast<int16_t*>(master.data)[i]; };
    for (int i = 0; i < n; i++) {
        p.set(i, float(i % 90) + 0.5f);
        if (master_dtype == I16) low(i) = int16_t(i * 7919);
        if (master_dtype == F32) master.set(i, float(i % 90) + 0.501f);
    }
    const auto counts = [&](int i) {  // a master, where the parameter's own bits are it, rounded
        Tensor rounded(1, dtype, 0);
        rounded.set(0, master.get(i));
        return rounded.get(0) == p.get(i);
    };
    std::vector<float> expected;
    for (int i = 0; i < n; i++) {
        const float theta = PRECISION != MASTER   ? p.get(i)
                            : master_dtype == F32 ? (counts(i) ? master.get(i) : p.get(i))
                                                  : join(reinterpret_cast<bf16*>(p.data)[i], low(i));
        expected.push_back(theta + 1.0f / 3);
    }
    const auto step = [&](auto chunk) {
        for (int thread = 0; thread < THREADS; thread++)
            map<WRITTEN<PRECISION, 0>, 2>(chunk, thread, [&](auto& x, int i) {
                float theta[VECTOR];
                for (int e = 0; e < VECTOR; e++) theta[e] = read<PRECISION>(x, e, chunk.dtype) + 1.0f / 3;
                write<PRECISION>(theta, x, master_dtype, chunk.begin + VECTOR * i, 5, 77);
            });
    };
    if constexpr (PRECISION == MASTER) step(Chunk<2>{{p.data, master.data}, {dtype, master_dtype}, n, 0, 0, begin});
    else step(Chunk<1>{{p.data}, {dtype}, n, 0, 0, begin});
    for (int i = 0; i < n; i++) {
        if (PRECISION == STOCHASTIC) {
            const int64_t element = begin + i;
            const uint32_t word = noise(element / DRAWS, 5, 77).x[element % DRAWS / 2];
            bf16 exact;
            stochastic_round(expected[i], element % 2 ? word >> 16 : word & 0xffffu, exact);
            REQUIRE(p.get(i) == widen(exact));
        } else if (master_dtype == I16 && PRECISION == MASTER) {
            REQUIRE(join(reinterpret_cast<bf16*>(p.data)[i], low(i)) == expected[i]);
        } else if (PRECISION == MASTER) {
            REQUIRE(master.get(i) == expected[i]);
        } else {
            Tensor rounded(1, dtype, 0);
            rounded.set(0, expected[i]);
            REQUIRE(p.get(i) == rounded.get(0));
        }
    }
}

static void keeping() {
    for (int n : {1, 4, 7, 1030}) {
        for (int dtype : {F32, BF16, F16}) parameters_are_kept<OWN>(n, dtype, F32, 0);
        for (int64_t begin : {int64_t(0), CHUNK, int64_t(1) << 36})
            parameters_are_kept<STOCHASTIC>(n, BF16, F32, begin);
        for (int dtype : {BF16, F16}) parameters_are_kept<MASTER>(n, dtype, F32, 0);
        parameters_are_kept<MASTER>(n, BF16, I16, 0);
    }
}

static void squares() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    for (int exponent = -140; exponent < 126; exponent++)  // from subnormals to the largest fp32
        for (int trial = 0; trial < 100; trial++) {
            float x[VECTOR];
            long double exact = 0;
            for (float& e : x) {
                e = std::ldexp(normal(random), random() % 2 ? exponent : exponent - int(random() % 40));
                exact += (long double)e * e;
            }
            REQUIRE(std::fabs(sum_of_squares(x) - exact) <= exact * 0x1p-22L);
        }
    const float inf = std::numeric_limits<float>::infinity();
    for (float bad : {inf, -inf, std::nanf("")})
        for (int e = 0; e < VECTOR; e++) {
            float x[VECTOR] = {1, -2, 3, 0};
            x[e] = bad;
            REQUIRE(!std::isfinite(sum_of_squares(x)));
        }
    const float zero[VECTOR] = {}, largest[VECTOR] = {FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX};
    REQUIRE(sum_of_squares(zero) == 0.0);
    REQUIRE(sum_of_squares(largest) == 4.0 * FLT_MAX * FLT_MAX);
}

static void stats() {
    float s[3];
    write_stats(25.0, 1.0f, 0.0, s);
    REQUIRE(s[0] == 5.0f && s[1] == 1.0f && s[2] == 0.0f);
    write_stats(25.0, 2.0f, 1.0, s);
    REQUIRE(s[0] == 2.5f && s[1] == float(0.5 / (2.5 + 1e-6)) && s[2] == 0.0f);
    write_stats(0.0, 4.0f, 1.0, s);
    REQUIRE(s[0] == 0.0f && s[1] == 0.25f && s[2] == 0.0f);
    for (double bad : {double(INFINITY), double(NAN), 1e300}) {
        write_stats(bad, 1.0f, 1.0, s);
        REQUIRE(!std::isfinite(s[0]) && s[2] == 1.0f);
    }
}

int main() {
    cover();
    known_dtypes();
    alignment();
    mapping();
    order();
    keeping();
    squares();
    stats();
}
