#pragma once
#include <nanobind/nanobind.h>

namespace quire {
// Adds whole decoder layers to the Python module.
void bind_decoder(nanobind::module_& m);
}  // namespace quire
