// Picks the kernels of a block in training.
#include "block_dispatch.h"

#include <string>

#include "dispatch.h"

namespace edet::cpu {

namespace baseline {
extern const BlockKernels block_table;
}
#ifdef EDET_HAVE_AVX2
namespace avx2 {
extern const BlockKernels block_table;
}
#endif
#ifdef EDET_HAVE_AVX512
namespace avx512 {
extern const BlockKernels block_table;
}
#endif
#ifdef EDET_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const BlockKernels block_table;
}
#endif

static const BlockKernels& choose() {
  const std::string isa = kernels().isa;
#ifdef EDET_HAVE_AVX512_BF16
  if (isa == "avx512_bf16" || isa == "amx") return avx512_bf16::block_table;
#endif
#ifdef EDET_HAVE_AVX512
  if (isa == "avx512") return avx512::block_table;
#endif
#ifdef EDET_HAVE_AVX2
  if (isa == "avx2") return avx2::block_table;
#endif
  return baseline::block_table;
}

const BlockKernels& block_kernels() {
  static const BlockKernels& chosen = choose();
  return chosen;
}

}  // namespace edet::cpu
