// Launchers of attention; see launch.h. They check addresses, sizes and strides before anything runs.
#include "launch.h"

#include <algorithm>
#include <cstdlib>

#include "kernels.h"

namespace fastlm {

constexpr int64_t LONGEST = int64_t(1) << 29;  // of positions: sums with distances of a band stay inside 32 bits

static Rows rows(const char* name, const View& view, const std::vector<int64_t>& shape) {
    const auto& [address, got, strides] = view;
    const std::string who = name;
    check(got == shape && strides.size() == 4, who + " does not have the shape that q and k imply");
    for (int64_t n : shape)
        if (n == 0) return {};
    check(address != 0 && address % 16 == 0, who + " is not at a multiple of 16 bytes");
    check(strides[3] == 1,
        who + " must have its channels side by side: the last stride is " + std::to_string(strides[3]));
    for (int d = 0; d < 3; d++)
        check(shape[d] == 1 || strides[d] % 8 == 0,
            who + " must have its rows at multiples of 16 bytes: a stride is " + std::to_string(strides[d]));
    return {reinterpret_cast<const char*>(address), strides[0], strides[1], strides[2]};
}

template <typename T>
static const T* term(const Terms& terms, const char* name) {
    const auto found = terms.find(name);
    if (found == terms.end()) return nullptr;
    return reinterpret_cast<const T*>(found->second);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arguments

// Sizes and band; no addresses.
static Attention sizes(const std::vector<int64_t>& q, const std::vector<int64_t>& k, const Band& band) {
    check(q.size() == 4 && k.size() == 4, "q and k must have four dimensions");
    for (int64_t n : q) check(n >= 0 && n < LONGEST, "a size is negative, or beyond 2²⁹");
    for (int64_t n : k) check(n >= 0 && n < LONGEST, "a size is negative, or beyond 2²⁹");
    const int64_t H = q[1], Lq = q[2], D = q[3], Hk = k[1], Lk = k[2];
    check(D >= 8 && D <= LARGEST_D && D % 8 == 0, "the head dimension is " + std::to_string(D) +
                                                      "; served are multiples of 8 up to " + std::to_string(LARGEST_D));
    check(Hk > 0 && H % Hk == 0, "query heads must be a multiple of key heads");
    const auto [left, right, offset] = band;
    check(Lq + Lk + std::abs(offset) < LONGEST, "the lengths or the offset are beyond 2²⁹");
    check(left + right >= 0, "the band is empty: left + right must be at least 0");
    Attention a = {};
    a.B = int(q[0]), a.H = int(H), a.group = int(H / Hk), a.Lq = int(Lq), a.Lk = int(Lk), a.D = int(D);
    // nobody sees further than all there is
    a.left = int(std::clamp(left, -LONGEST, LONGEST)), a.right = int(std::clamp(right, -LONGEST, LONGEST));
    a.offset = int(offset);
    return a;
}

static void take(const Terms& terms, Attention& a) {
    for (const auto& [name, address] : terms)
        check(name == "table" || name == "key_lengths" || name == "prefix" || name == "q_segments" ||
                  name == "k_segments",
            name + " is not served");
    a.table = term<float>(terms, "table");
    a.key_lengths = term<int64_t>(terms, "key_lengths"), a.prefix = term<int64_t>(terms, "prefix");
    a.q_segments = term<int64_t>(terms, "q_segments"), a.k_segments = term<int64_t>(terms, "k_segments");
    check(terms.count("q_segments") == terms.count("k_segments"), "segments must be given for queries and keys");
}

static Attention attention(const View& q, const View& k, const View& v, int dtype, const Terms& terms, const Band& band,
    double scale, Address out, Address lse) {
    const auto& q_shape = std::get<1>(q);
    const auto& k_shape = std::get<1>(k);
    Attention a = sizes(q_shape, k_shape, band);
    take(terms, a);
    check(dtype == F16 || dtype == BF16, "the dtype must be fp16 or bf16");
    check(scale > 0, "scale is " + std::to_string(scale) + "; served are positive scales");
    check(int64_t(a.B) * a.H * a.Lq == 0 || (out && lse), "out and lse must be given");
    check(k_shape[0] == q_shape[0] && k_shape[3] == q_shape[3], "k does not have the shape that q implies");
    a.q = rows("q", q, q_shape), a.k = rows("k", k, k_shape), a.v = rows("v", v, k_shape);
    a.scale = float(scale);
    a.out = reinterpret_cast<char*>(out);
    a.lse = reinterpret_cast<float*>(lse);
    return a;
}

// ---------------------------------------------------------------------------------------------------------------------
// Workspace

class Workspace {
public:
    explicit Workspace(Address begin) : begin_(begin) {}

    template <typename T>
    T* take(int64_t n) {  // in the order of T's sizes, largest first
        T* const taken = reinterpret_cast<T*>(begin_ + bytes);
        bytes += n * int64_t(sizeof(T));
        return taken;
    }

    int64_t bytes = 0;

private:
    Address begin_;
};

static void lay_out(Attention& a, Workspace& space) {
    if (!a.q_segments) return;
    const int64_t queries = int64_t(a.B) * pieces(a.Lq, BOUNDED), keys = int64_t(a.B) * pieces(a.Lk, BOUNDED);
    a.q_least = space.take<int64_t>(queries), a.q_largest = space.take<int64_t>(queries);
    a.k_least = space.take<int64_t>(keys), a.k_largest = space.take<int64_t>(keys);
}

static int64_t ceiling(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // of a / b, b > 0

// The block diagonals that hold a visible distance, numbered by column - row of their tiles, and how many blocks share
// each: about 16 tiles for one on the longest, but no more blocks than fill a GPU, for each writes sums of its own.
static void choose_diagonals(AttentionBackward& x) {
    const Attention& a = x.forward;
    const int rows = pieces(a.Lq, BLOCK), columns = pieces(a.Lk, BLOCK);
    int64_t first = 1 - rows, end = columns;
    if (!a.prefix) {
        first = std::max(first, ceiling(int64_t(a.offset) - a.left - (BLOCK - 1), BLOCK));
        end = std::min(end, ceiling(int64_t(a.offset) + a.right + 1, BLOCK) + 1);
    }
    x.first_diagonal = int(first);
    x.diagonals = int(std::max<int64_t>(0, end - first));
    const int64_t enough = ceiling(4096, std::max<int64_t>(1, int64_t(a.H) * x.diagonals));
    const int64_t tiles = int64_t(a.B) * std::min(rows, columns);
    x.splits = int(std::max<int64_t>(1, std::min({int64_t(16), tiles / 16, enough})));
}

static void lay_out(AttentionBackward& x, bool table, Workspace& space) {
    Attention& a = x.forward;
    lay_out(a, space);
    const int64_t queries = padded_row(a, int64_t(a.B) * a.H);
    x.lse = space.take<float>(queries), x.delta = space.take<float>(queries);
    if (!table) return;
    choose_diagonals(x);
    x.partial = space.take<float>(int64_t(a.H) * x.splits * x.diagonals * 2 * BLOCK);
}

int64_t attention_workspace(const std::vector<int64_t>& q, const std::vector<int64_t>& k, const Terms& terms) {
    Attention a = sizes(q, k, {0, 0, 0});
    take(terms, a);
    Workspace space(0);
    lay_out(a, space);
    return space.bytes;
}

int64_t attention_backward_workspace(
    const std::vector<int64_t>& q, const std::vector<int64_t>& k, const Terms& terms, const Band& band, bool table) {
    AttentionBackward x = {};
    x.forward = sizes(q, k, band);
    take(terms, x.forward);
    Workspace space(0);
    lay_out(x, table, space);
    return space.bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

void launch_attention(const View& q, const View& k, const View& v, int dtype, const Terms& terms, const Band& band,
    double scale, Address out, Address lse, Address workspace, int device, Address stream) {
    Attention a = attention(q, k, v, dtype, terms, band, scale, out, lse);
    Workspace space(workspace);
    lay_out(a, space);
    check(workspace != 0 || space.bytes == 0, "workspace is null");
    if (int64_t(a.B) * a.H * a.Lq == 0) return;
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    segment_bounds(a, queue);
    forward(a, dtype, queue);
}

void launch_attention_backward(const View& grad, Address grad_lse, const View& q, const View& k, const View& v,
    int dtype, const Terms& terms, const Band& band, double scale, Address out, Address lse, Address dq_out,
    Address dk_out, Address dv_out, Address dtable, Address workspace, int device, Address stream) {
    AttentionBackward x = {};
    x.forward = attention(q, k, v, dtype, terms, band, scale, out, lse);
    const Attention& a = x.forward;
    x.grad = rows("grad", grad, std::get<1>(q));
    x.grad_lse = reinterpret_cast<const float*>(grad_lse);
    const int64_t queries = int64_t(a.B) * a.H * a.Lq, keys = int64_t(a.B) * a.H * a.Lk;
    check((dq_out || queries == 0) && ((dk_out && dv_out) || keys == 0), "dq, dk and dv must be given");
    check(!dtable || a.table, "dtable is given without a table");
    x.dq = reinterpret_cast<char*>(dq_out);
    x.dk = reinterpret_cast<char*>(dk_out), x.dv = reinterpret_cast<char*>(dv_out);
    x.dtable = reinterpret_cast<float*>(dtable);
    Workspace space(workspace);
    lay_out(x, dtable != 0, space);
    check(workspace != 0 || space.bytes == 0, "workspace is null");
    const OnDevice on(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    if (queries > 0) {
        segment_bounds(a, queue);
        delta(x, dtype, queue);
        dq(x, dtype, queue);
    }
    if (keys > 0) dkdv(x, dtype, queue);
    if (dtable) table(x, dtype, queue);
}

}  // namespace fastlm
