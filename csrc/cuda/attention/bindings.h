// Attention's part of the module fastlm._cuda.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"

namespace fastlm {

static inline void bind_attention(pybind11::module_& m) {
    using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("attention_workspace", &attention_workspace, "Bytes of workspace for q and k of these shapes.");
    m.def("attention_backward_workspace", &attention_backward_workspace, "The same for the gradient.");
    m.def("attention", &launch_attention, unlocked());
    m.def("attention_backward", &launch_attention_backward, unlocked());
}

}  // namespace fastlm
