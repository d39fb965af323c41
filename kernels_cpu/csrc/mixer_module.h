#pragma once
#include <nanobind/nanobind.h>

namespace quire {
// Adds the mixers of state-space models to the Python module.
void bind_mixer(nanobind::module_& m);
// Adds those of gated delta nets.
void bind_delta(nanobind::module_& m);
}  // namespace quire
