// Functions that host and device compile from one source.
#pragma once

#if defined(__CUDACC__) || defined(__HIP__)
#define HOST_DEVICE __host__ __device__ inline __attribute__((always_inline))
#define UNROLL _Pragma("unroll")
#else
#define HOST_DEVICE inline
#define UNROLL
#endif
