// The ISA levels of this build, and which of them is in use.
#pragma once
#include <string>
#include <vector>

#include "layers.h"
#include "quantize.h"

namespace quire {

struct Level {
  const char* name;
  const Table* kernels;
  const LinearTable* linear;
  const LayerTable* layers;
  const QuantizeTable* quantize;
};

// What this machine can run, best first. Never empty.
std::vector<Level> available_levels();

// The level in use: at first the best.
const Level& chosen_level();

// Throws std::invalid_argument if this machine or this build lacks the level.
void choose_level(const std::string& name);

}  // namespace quire
