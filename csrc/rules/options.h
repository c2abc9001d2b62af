// What optimizers' launchers take from Python, the same in fastlm._cpu and fastlm._cuda: each made of the fields of the
// named tuple beside it, in order. tests/optim/test_update.py compares the names.
#pragma once

#include <pybind11/pybind11.h>

#include "adafactor.h"
#include "adam.h"
#include "lists.h"
#include "sgd.h"

namespace fastlm {

static inline void bind_update(pybind11::module_& m) {
    namespace py = pybind11;
    const auto local = py::module_local();
    py::class_<Update>(m, "Update", local)  // fastlm/ops/optim/update.py: the fields of all optimizers' lists
        .def(py::init<Tensors, Tensors, std::vector<int64_t>, Tensors, Addresses, Address, Address>());
    py::class_<AdamOptions>(m, "AdamOptions", local)  // fastlm/ops/optim/adamw.py
        .def(py::init<double, double, double, double, double, int, bool>());
    py::class_<RatioOptions>(m, "RatioOptions", local)  // fastlm/ops/optim/lamb.py
        .def(py::init<bool, bool, double, double, double, double>());
    py::class_<SgdOptions>(m, "SgdOptions", local)  // fastlm/ops/optim/sgd.py
        .def(py::init<double, double, double, double, bool>());
    py::class_<AdafactorOptions>(m, "AdafactorOptions", local)  // fastlm/ops/optim/adafactor.py
        .def(py::init<double, bool, double, double, double, double, double, double, bool, double, double, double,
            double, bool>());
}

}  // namespace fastlm
