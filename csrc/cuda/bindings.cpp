// The module fastlm._cuda. Python passes addresses, sizes, a device and a stream; the interpreter lock is released
// during launches.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../rules/options.h"
#include "attention/bindings.h"
#include "launch.h"

namespace py = pybind11;
using namespace fastlm;
using unlocked = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cuda, m) {
    m.doc() =
        "fastlm's CUDA kernels; see csrc/cuda/launch.h and attention/launch.h for what each takes. Called through "
        "fastlm.ops, which checks "
        "tensors.";
    bind_update(m);
    bind_attention(m);
    m.def("adamw_workspace", &adamw_workspace, "Bytes of workspace for tensors of these sizes.");
    m.def("lamb_workspace", &lamb_workspace, "Bytes of workspace for tensors of these sizes.");
    m.def("sgd_workspace", &sgd_workspace, "Bytes of workspace for tensors of these sizes.");
    m.def("adafactor_workspace", &adafactor_workspace, "Bytes of workspace for tensors of these shapes.");
    m.def("grad_stats_workspace", &grad_stats_workspace, "Bytes of workspace for tensors of these sizes.");
    m.def("adamw", &launch_adamw, unlocked());
    m.def("lamb", &launch_lamb, unlocked());
    m.def("sgd", &launch_sgd, unlocked());
    m.def("adafactor", &launch_adafactor, unlocked());
    m.def("grad_stats", &launch_grad_stats, unlocked());
    m.def("unscale", &launch_unscale, unlocked());
}
