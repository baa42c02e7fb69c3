// The kernels of a block in training, compiled once for each instruction set as kernels.cpp is, and
// by the same rules; a file of its own, so that the two are compiled side by side.
#include "block_training.h"

namespace edet::cpu::EDET_ISA {

extern const BlockKernels block_table;
const BlockKernels block_table = {moments_scratch,
                                  moments_sums,
                                  moments_products,
                                  moments_backward,
                                  block_depthwise_scratch,
                                  block_depthwise,
                                  block_depthwise_backward,
                                  block_project_scratch,
                                  block_pool,
                                  block_project,
                                  block_project_backward,
                                  block_project_finish};

}  // namespace edet::cpu::EDET_ISA
