// The few names of the driver's interface that csrc/cuda uses.
#pragma once

#include <cstdint>

using CUstream = struct CUstream_st*;
using CUdeviceptr = unsigned long long;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum { CU_STREAM_WRITE_VALUE_DEFAULT = 0, CU_STREAM_WAIT_VALUE_GEQ = 0 };
#define CUDAAPI
