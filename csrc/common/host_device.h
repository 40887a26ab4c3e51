// Marks functions that the CPU code and the CUDA kernels share, so that a formula is written once.
#pragma once

#ifdef __CUDACC__
#define RSL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RSL_HOST_DEVICE inline
#endif
