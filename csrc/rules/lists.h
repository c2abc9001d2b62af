/* Lists of tensors as Python hands them to launchers, and what is checked before anything runs. Host code, the same in
fastlm._cpu and fastlm._cuda; a check that fails throws std::invalid_argument, which Python sees as ValueError. */
#pragma once

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numeric.h"

namespace fastlm {

using Address = uintptr_t;                             // 0 for "not given"
using Addresses = std::vector<Address>;
using Tensors = std::vector<std::pair<Address, int>>;  // (address, dtype) of dense tensors
using Sizes = std::vector<int64_t>;                    // elements of each tensor
// (matrices, rows, columns); columns 0: not factored, `rows` elements
using Shapes = std::vector<std::array<int64_t, 3>>;

// What every optimizer's launcher is given, besides its own states: fastlm/ops/optim/update.py. Steps are fp32 scalars,
// advanced by one; coefficient, which multiplies gradients, and found_inf are fp32 scalars or 0; found_inf ≠ 0 leaves
// every bit as it is.
struct Update {
    Tensors params;
    Tensors masters;            // empty, or one for each: fp32 masters, or int16 remainders of bf16 parameters
    std::vector<int64_t> keys;  // empty, or one for each: round stochastically under this Philox key
    Tensors grads;
    Addresses steps;
    Address coefficient, found_inf;
};

static inline void check(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

static inline void check_list(const char* name, const Tensors& list, const Sizes& sizes, int last_dtype = F16) {
    const std::string who = name;
    check(list.size() == sizes.size(),
        who + " has " + std::to_string(list.size()) + " tensors for " + std::to_string(sizes.size()) + " sizes");
    for (size_t t = 0; t < list.size(); t++) {
        const auto [address, dtype] = list[t];
        check(sizes[t] >= 0, "a size is negative");
        check(address != 0 || sizes[t] == 0, who + " holds a null address");
        check(dtype >= F32 && dtype <= last_dtype, who + " holds a dtype that is not fp32, bf16 or fp16");
        check(
            address % element_size(dtype) == 0, who + " holds an address that is not a multiple of its element's size");
    }
}

static inline void check_parameters(const Update& update, const Sizes& sizes) {
    const Tensors &params = update.params, &masters = update.masters;
    const std::vector<int64_t>& keys = update.keys;
    check_list("params", params, sizes);
    check(keys.empty() || keys.size() == sizes.size(), "keys and params differ in number");
    if (!masters.empty()) check_list("masters", masters, sizes, I16);
    for (size_t t = 0; t < sizes.size(); t++) {
        const int dtype = params[t].second;
        check(keys.empty() || (dtype == BF16 && masters.empty()),
            "stochastic rounding is for bf16 parameters without master");
        if (masters.empty()) continue;
        const int master = masters[t].second;
        check(master == F32 ? dtype != F32 : master == I16 && dtype == BF16,
            "masters are fp32 of 16-bit parameters, or int16 remainders of bf16");
    }
}

// states: the optimizer's own lists, by name.
static inline void check_update(
    const Update& update, const Sizes& sizes, std::initializer_list<std::pair<const char*, const Tensors*>> states) {
    check_parameters(update, sizes);
    check_list("grads", update.grads, sizes);
    for (const auto& [name, list] : states) check_list(name, *list, sizes);
    check(update.steps.size() == sizes.size(), "steps and params differ in number");
    for (Address step : update.steps) check(step != 0, "steps holds a null address");
}

static inline Sizes sizes_of(const Shapes& shapes) {
    Sizes sizes;
    for (const auto& [matrices, rows, columns] : shapes) {
        check(matrices >= 0 && rows >= 0 && columns >= 0, "a size is negative");
        sizes.push_back(matrices * rows * (columns > 0 ? columns : 1));
    }
    return sizes;
}

// rows, columns: Adafactor's factors, fp32.
static inline void check_factors(
    const Addresses& rows, const Addresses& columns, const Shapes& shapes, const Sizes& sizes) {
    check(rows.size() == sizes.size() && columns.size() == sizes.size(), "factors and params differ in number");
    for (size_t t = 0; t < sizes.size(); t++)
        check(sizes[t] == 0 || (rows[t] && (columns[t] || shapes[t][2] == 0)), "a factor has a null address");
}

struct Group {
    size_t begin, end;
};  // tensors begin … end - 1

// Runs of at most `most` tensors that together have up to `elements`; a larger tensor is a group by itself.
static inline std::vector<Group> groups(const Sizes& sizes, int64_t elements, size_t most) {
    std::vector<Group> all;
    int64_t sum = 0;
    for (size_t t = 0; t < sizes.size(); t++) {
        if (all.empty() || sum + sizes[t] > elements || t - all.back().begin == most) {
            all.push_back({t, t});
            sum = 0;
        }
        all.back().end = t + 1;
        sum += sizes[t];
    }
    return all;
}

}  // namespace fastlm
