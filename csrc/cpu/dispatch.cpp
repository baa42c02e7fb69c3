// Picks the kernels for the CPU this runs on.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(EDET_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace edet::cpu {

namespace baseline {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace baseline
#ifdef EDET_HAVE_AVX2
namespace avx2 {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace avx2
#endif
#ifdef EDET_HAVE_AVX2_VNNI
namespace avx2_vnni {
extern const Int8Kernels int8_table;
}
#endif
#ifdef EDET_HAVE_AVX512
namespace avx512 {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace avx512
#endif
#ifdef EDET_HAVE_AVX512_VNNI
namespace avx512_vnni {
extern const Int8Kernels int8_table;
}
#endif
#ifdef EDET_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
#ifdef EDET_HAVE_AMX
namespace amx {
extern const Kernels table;
extern const Int8Kernels int8_table;
}  // namespace amx
#endif

namespace {

// An instruction set by its name: VNNI makes no difference to maps of floats, bf16 none to maps of
// bytes.
struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  const Int8Kernels* int8;
};

#if defined(EDET_HAVE_AVX2_VNNI)
// AVX-VNNI, which compilers name later than processors have it: CPUID 7.1, EAX bit 4.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(EDET_HAVE_AMX)
// Whether this CPU multiplies bf16 and bytes in tiles (CPUID 7.0, EDX bits 22, 24 and 25) and the
// kernel lets this process do so: the registers are large, and Linux saves them for those who asked
// only.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 13) != 13) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// What was built and what this CPU can run, the best one first.
std::vector<InstructionSet> usable() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(EDET_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    const Int8Kernels* bytes = &avx512::int8_table;
#if defined(EDET_HAVE_AVX512_VNNI)
    if (__builtin_cpu_supports("avx512vnni")) bytes = &avx512_vnni::int8_table;
#endif
#if defined(EDET_HAVE_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
#if defined(EDET_HAVE_AMX)
      if (__builtin_cpu_supports("avx512vnni") && may_use_tiles())
        sets.push_back({"amx", &amx::table, &amx::int8_table});
#endif
      sets.push_back({"avx512_bf16", &avx512_bf16::table, bytes});
    }
#endif
    if (bytes != &avx512::int8_table) sets.push_back({"avx512_vnni", &avx512::table, bytes});
    sets.push_back({"avx512", &avx512::table, &avx512::int8_table});
  }
#endif
#if defined(EDET_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
#if defined(EDET_HAVE_AVX2_VNNI)
    if (has_avx_vnni()) sets.push_back({"avx2_vnni", &avx2::table, &avx2_vnni::int8_table});
#endif
    sets.push_back({"avx2", &avx2::table, &avx2::int8_table});
  }
#endif
  sets.push_back({"baseline", &baseline::table, &baseline::int8_table});
  return sets;
}

InstructionSet choose() {
  const std::vector<InstructionSet> sets = usable();
  const char* asked = std::getenv("EDET_CPU_ISA");
  if (!asked || !*asked) return sets.front();
  std::string names;
  for (const InstructionSet& set : sets) {
    if (set.name == std::string(asked)) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::invalid_argument("EDET_CPU_ISA must be one of " + names + " on this CPU, got '" +
                              asked + "'");
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose();
  return set;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

const Int8Kernels& int8_kernels() { return *chosen().int8; }

}  // namespace edet::cpu
