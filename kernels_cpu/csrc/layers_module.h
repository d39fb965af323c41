#pragma once
#include <nanobind/nanobind.h>

namespace quire {
// Adds experts, recurrences and the vocabulary to the Python module.
void bind_layers(nanobind::module_& m);
}  // namespace quire
