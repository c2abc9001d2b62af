// The optimizers' options as Python sees them, the same in fastlm._cpu and fastlm._cuda: made of the op's scalars, in
// order.
#pragma once

#include <pybind11/pybind11.h>

#include "adafactor.h"
#include "adam.h"
#include "sgd.h"

namespace fastlm {

static inline void bind_options(pybind11::module_& m) {
    namespace py = pybind11;
    const auto local = py::module_local();
    py::class_<AdamOptions>(m, "AdamOptions", local).def(py::init<double, double, double, double, double, int, bool>());
    py::class_<RatioOptions>(m, "RatioOptions", local).def(py::init<bool, bool, double, double, double, double>());
    py::class_<SgdOptions>(m, "SgdOptions", local).def(py::init<double, double, double, double, bool>());
    py::class_<AdafactorOptions>(m, "AdafactorOptions", local)
        .def(py::init<double, bool, double, double, double, double, double, double, bool, double, double, double,
            double, bool>());
}

}  // namespace fastlm
