// The module fastlm._cpu. Python passes addresses and sizes; the interpreter lock is released while threads work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../rules/options.h"
#include "../rules/philox.h"
#include "launch.h"

namespace py = pybind11;
using namespace fastlm;
using unlocked = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "fastlm's C++ kernels; see csrc/cpu/launch.h for what each takes. Called through fastlm.ops, which checks "
        "tensors.";
    m.def(
        "available",
        [] {
            std::vector<std::string> names;
            for (const Kernels* set : available()) names.push_back(set->name);
            return names;
        },
        "Names of the instruction sets this processor has, best first.");
    m.def("active", [] { return std::string(active().name); }, "Name of the instruction set in use.");
    m.def("use", &use, "Use the instruction set of this name; raises ValueError if the processor lacks it.");
    m.attr("openmp") =
#if defined(_OPENMP)
        true;
#else
        false;
#endif
    bind_update(m);
    m.def(
        "philox",
        [](std::array<uint32_t, 4> counter, uint64_t key) {
            const Philox w = philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
            return std::array<uint32_t, 4>{w.x[0], w.x[1], w.x[2], w.x[3]};
        },
        "The four words of Philox4x32-10.");
    m.def("adamw", &launch_adamw, unlocked());
    m.def("lamb", &launch_lamb, unlocked());
    m.def("sgd", &launch_sgd, unlocked());
    m.def("adafactor", &launch_adafactor, unlocked());
    m.def("grad_stats", &launch_grad_stats, unlocked());
    m.def("unscale", &launch_unscale, unlocked());
    m.def("rotate", &launch_rotate, unlocked());
    m.def("norm", &launch_norm, unlocked());
    m.def("norm_backward", &launch_norm_backward, unlocked());
    m.def("gate", &launch_gate, unlocked());
    m.def("gate_backward", &launch_gate_backward, unlocked());
    m.def("embedding_backward", &launch_embedding_backward, unlocked());
    m.def("linear", &launch_linear, unlocked());
    m.def("logits_measure", &launch_logits_measure, unlocked());
    m.def("logits_gradient", &launch_logits_gradient, unlocked());
    m.def("logits_lose", &launch_logits_lose, unlocked());
    m.def(
        "attention_exp",
        [](Address x, Address out, int64_t n) {
            active().attention_exp(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(out), n);
        },
        "out = eˣ of n fp32 x ≤ 0, as the kernels of attention take it.");
    m.def("attention", &launch_attention, unlocked());
    m.def("attention_backward", &launch_attention_backward, unlocked());
}
