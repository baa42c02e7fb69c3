// The part of CUDA's host API that the launchers' headers and the glue use, for a build without
// CUDA: the emulation puts its folder before CUDA's.
#pragma once

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,  // a kernel did what it must not; cudaGetErrorString says what
};
using cudaStream_t = void*;

// A failed launch's report is that of this thread's last one.
const char* cudaGetErrorString(cudaError_t error);
