// Compiled for the baseline: asks the machine what it has.
#include "levels.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__riscv) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(QUIRE_HAVE_amx) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// LEVEL(name, condition): best first; a condition may ask what the level below it has asked.
#if defined(QUIRE_HAVE_amx)
#define QUIRE_LEVEL_AMX(LEVEL) \
  LEVEL(amx, has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") && has_amx())
#else
#define QUIRE_LEVEL_AMX(LEVEL)
#endif
#if defined(QUIRE_HAVE_avx2)
#define QUIRE_LEVELS(LEVEL)                                                    \
  QUIRE_LEVEL_AMX(LEVEL)                                                       \
  LEVEL(avx512_bf16, has_avx512() && __builtin_cpu_supports("avx512vnni") &&   \
                         __builtin_cpu_supports("avx512bf16"))                 \
  LEVEL(avx512_vnni, has_avx512() && __builtin_cpu_supports("avx512vnni"))     \
  LEVEL(avx512, has_avx512())                                                  \
  LEVEL(avx2_vnni, has_avx2() && has_avx_vnni())                               \
  LEVEL(avx2, has_avx2())                                                      \
  LEVEL(generic, true)
#elif defined(QUIRE_HAVE_dotprod)
#define QUIRE_LEVELS(LEVEL) LEVEL(i8mm, has_dotprod() && has_i8mm()) LEVEL(dotprod, has_dotprod()) LEVEL(generic, true)
#elif defined(QUIRE_HAVE_rvv)
#define QUIRE_LEVELS(LEVEL) LEVEL(rvv, has_rvv()) LEVEL(generic, true)
#else
#define QUIRE_LEVELS(LEVEL) LEVEL(generic, true)
#endif

namespace quire {

#define DECLARE(name, condition)     \
  extern const Table table_##name;   \
  extern const LinearTable linear_##name; \
  extern const LayerTable layers_##name;    \
  extern const QuantizeTable quantize_##name;
QUIRE_LEVELS(DECLARE)
#undef DECLARE

#if defined(QUIRE_HAVE_avx2)
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(QUIRE_HAVE_amx)
// Tiles of int8 and bfloat16, and the leave of the system to use them, which a process asks for once.
static bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
#if defined(__linux__)
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_tiles && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  (void)has_tiles;
  return false;
#endif
}
#endif

// Compilers learned the name late.
static bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#elif defined(QUIRE_HAVE_dotprod)
static bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple processor has it
#endif
}

// Products of integers of different signs, among others.
static bool has_i8mm() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_I8MM;
#else
  return false;
#endif
}
#elif defined(QUIRE_HAVE_rvv)
static bool has_rvv() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> ('v' - 'a') & 1;
#else
  return false;
#endif
}
#endif

std::vector<Level> available_levels() {
#if defined(QUIRE_HAVE_avx2)
  __builtin_cpu_init();
#endif
  std::vector<Level> levels;
#define ADD(name, condition) \
  if (condition) levels.push_back({#name, &table_##name, &linear_##name, &layers_##name, &quantize_##name});
  QUIRE_LEVELS(ADD)
#undef ADD
  return levels;
}

static Level& chosen() {
  static Level level = available_levels().front();
  return level;
}

const Level& chosen_level() { return chosen(); }

void choose_level(const std::string& name) {
  std::string names;
  for (const Level& level : available_levels()) {
    if (name == level.name) {
      chosen() = level;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("the ISA level '" + name + "' was asked for; this machine, with this build, has " + names +
                              ": choose one of these");
}

}  // namespace quire
