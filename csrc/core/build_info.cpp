// What this build holds, as text that can be read without torch (edet_kernels/library.py does,
// through ctypes).

#ifndef EDET_VERSION
#error "EDET_VERSION and the EDET_…_INFO come from CMakeLists.txt"
#endif

// One "name=value" per line. cpu: instruction sets; cuda: "none" or "<nvcc version>
// <architectures>", where 90-real is machine code, 120-virtual is PTX and a plain 120 is both.
extern "C" __attribute__((visibility("default"))) const char* edet_build_info() {
  return "version=" EDET_VERSION "\ncpu=" EDET_CPU_INFO "\ncuda=" EDET_CUDA_INFO
         "\nsanitize=" EDET_SANITIZE_INFO "\n";
}
