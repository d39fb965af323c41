#pragma once
#include <nanobind/nanobind.h>

namespace quire {
// Adds the quantizing of weights to the Python module.
void bind_quantize(nanobind::module_& m);
}  // namespace quire
