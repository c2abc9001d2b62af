// The module fastlm._cuda with attention alone, for tests.
#include "bindings.h"

PYBIND11_MODULE(_cuda, m) { fastlm::bind_attention(m); }
