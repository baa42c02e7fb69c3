// Picks the kernels for the CPU this runs on.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace edet::cpu {

namespace baseline {
extern const Kernels table;
}
#ifdef EDET_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef EDET_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif
#ifdef EDET_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

// Tables that were built and that this CPU can run, the best one first.
static std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(EDET_HAVE_AVX512) || defined(EDET_HAVE_AVX512_BF16)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef EDET_HAVE_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&avx512_bf16::table);
#endif
#ifdef EDET_HAVE_AVX512
  if (avx512) tables.push_back(&avx512::table);
#endif
#ifdef EDET_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    tables.push_back(&avx2::table);
#endif
  tables.push_back(&baseline::table);
  return tables;
}

static const Kernels& choose() {
  const std::vector<const Kernels*> tables = usable();
  const char* asked = std::getenv("EDET_CPU_ISA");
  if (!asked || !*asked) return *tables.front();
  std::string names;
  for (const Kernels* t : tables) {
    if (t->isa == std::string(asked)) return *t;
    names += (names.empty() ? "" : ", ") + std::string(t->isa);
  }
  throw std::invalid_argument("EDET_CPU_ISA must be one of " + names + " on this CPU, got '" +
                              asked + "'");
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace edet::cpu
