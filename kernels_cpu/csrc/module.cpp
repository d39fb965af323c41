// The Python module: integers in, kernels called, nothing of torch's ABI. The checks are in kernels_cpu/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace quire {
extern const Table table_generic;
#ifdef QUIRE_HAVE_avx2
extern const Table table_avx2, table_avx512, table_avx512bf16;
#endif

// Best first. Every entry runs on this machine.
static std::vector<const Table*> available() {
  std::vector<const Table*> tables;
#ifdef QUIRE_HAVE_avx2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&table_avx512bf16);
  if (avx512) tables.push_back(&table_avx512);
  if (avx2) tables.push_back(&table_avx2);
#endif
  tables.push_back(&table_generic);
  return tables;
}

static const Table* chosen = available().front();

static void use_isa(const std::string& name) {
  for (const Table* table : available())
    if (name == table->name) {
      chosen = table;
      return;
    }
  throw std::invalid_argument("this machine or this build has no ISA level named '" + name + "'");
}
}  // namespace quire

NB_MODULE(_cpu, m) {
  using namespace quire;
  m.def("isa", [] { return std::string(chosen->name); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Table* table : available()) names.emplace_back(table->name);
    return names;
  });
  m.def("use_isa", &use_isa);
}
