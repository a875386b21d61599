// As much of CUDA as csrc/cuda uses, on the CPU, so that the sources themselves can be run, not a
// copy of them: a CUDA block is a set of fibers scheduled in random order (emulation.cpp), device
// memory is memory, streams do everything at once. Found instead of the toolkit's header.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- inside a kernel ----------------------------------------------------------------------------

extern dim3 threadIdx;  // of the fiber that runs
extern dim3 blockIdx;

namespace emulation {
enum class Exchange : int { kShuffle, kBallot, kMultiplyAdd };
// What `source` lane of the fiber's warp brought to this exchange; all lanes must come.
uint64_t exchange(Exchange kind, uint64_t bits, int source);
// Which lanes brought something other than 0.
uint32_t vote(bool holds);
void check_mask(uint32_t mask);
// mma.m16n8k16: what a lane holds of [16 x 8] += [16 x 16] x [16 x 8], in csrc's tensor_core.cuh.
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*widen)(uint16_t));
inline int lane() { return static_cast<int>(threadIdx.x % 32); }
}  // namespace emulation

void __syncthreads();

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  emulation::check_mask(mask);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulation::exchange(emulation::Exchange::kShuffle, bits, emulation::lane() ^ offset);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
  emulation::check_mask(mask);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const int source = emulation::lane() < offset ? emulation::lane() : emulation::lane() - offset;
  bits = emulation::exchange(emulation::Exchange::kShuffle, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, bool holds) {
  emulation::check_mask(mask);
  return emulation::vote(holds);
}

template <class T>
T __ldcs(const T* from) {
  return *from;
}

// Bytes of the two words, the first one's counted from 0, the second one's from 4.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8) & 0xff;
    result |= byte << 8 * i;
  }
  return result;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- the runtime --------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorSymbolNotFound = 500,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device);

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {
cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* context);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::tuple<Parameters...> values(arguments...);
  auto body = [&] { std::apply(kernel, values); };
  return emulation::launch(
      *config, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice
};
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);

enum cudaMemcpySrcAccessOrder {
  cudaMemcpySrcAccessOrderStream = 1,
  cudaMemcpySrcAccessOrderDuringApiCall = 2,
  cudaMemcpySrcAccessOrderAny = 3
};
struct cudaMemLocation {
  int type, id;
};
struct cudaMemcpyAttributes {
  cudaMemcpySrcAccessOrder srcAccessOrder;
  cudaMemLocation srcLocHint, dstLocHint;
  unsigned flags;
};
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* bytes,
                                 size_t count, cudaMemcpyAttributes* attributes,
                                 size_t* attribute_indices, size_t num_attributes,
                                 cudaStream_t stream);

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
