// All CPU kernels of one instruction set: this file is compiled once for each, with EDET_ISA as the
// name of its namespace. It uses no standard-library templates: an inline function compiled here
// for AVX-512 must never be the copy the linker keeps for everyone.
#include "dispatch.h"
#include "lateral.h"
#include "mbconv.h"
#include "node_backward.h"
#include "scan.h"
#include "separable_node.h"
#include "stem.h"

#define EDET_STRING_(x) #x
#define EDET_STRING(x) EDET_STRING_(x)

namespace edet::cpu::EDET_ISA {

extern const Kernels table;
const Kernels table = {EDET_STRING(EDET_ISA), node_scratch,   separable_node,
                       node_backward_scratch, conv_backward,  fusion_backward,
                       resize_backward,       fusion_band,    lateral_scratch,
                       lateral_block,         mbconv_scratch, mbconv_expand,
                       mbconv_squeeze,        mbconv_gate,    mbconv_project,
                       stem_scratch,          stem_rows,      scan};

}  // namespace edet::cpu::EDET_ISA
