#pragma once
#include <nanobind/nanobind.h>

namespace quire {
// Adds the linear layers to the Python module.
void bind_linear(nanobind::module_& m);
}  // namespace quire
