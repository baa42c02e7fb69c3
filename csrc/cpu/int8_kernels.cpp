// All kernels on maps of bytes of one instruction set, compiled once for each like kernels.cpp, but
// without contraction of float operations (CMakeLists.txt): every instruction set gives the same
// bytes.
#include "dispatch.h"
#include "int8_mbconv.h"
#include "int8_node.h"

namespace edet::cpu::EDET_ISA {

extern const Int8Kernels int8_table;
const Int8Kernels int8_table = {int8_mbconv_scratch, int8_mbconv_expand,      int8_mbconv_squeeze,
                                int8_mbconv_gate,    int8_mbconv_project,     int8_node_scratch,
                                int8_node,           int8_projection_scratch, int8_projection,
                                int8_pool,           int8_quantize,           int8_dequantize};

}  // namespace edet::cpu::EDET_ISA
