// marks functions that C++, CUDA's host code and CUDA's kernels share. nvcc compiles a call of a function that is for
// the device alone, from host code, without a warning: the call then ends the process

#pragma once

#if defined(__CUDACC__)
#define PRISM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PRISM_HOST_DEVICE inline
#endif
