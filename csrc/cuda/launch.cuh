// The host's side of a call: its device, its launches, its errors.
#pragma once

#include <cuda_runtime.h>

#include "cuda_api.h"

namespace hf_tiered_cache {
namespace {

CudaStatus status_of(cudaError_t error) {
  if (error == cudaSuccess) return {0, ""};
  return {static_cast<int>(error), cudaGetErrorString(error)};
}

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      is_changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (is_changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool is_changed_ = false;
  cudaError_t error_;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void* stream, dim3 grid, int threads, int shared_bytes,
                   void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A constant that a generic lambda can use as a template argument.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// What `make` gives for the type, known to it at compile time.
template <class Make>
auto with_dtype(DType dtype, const Make& make) {
  switch (dtype) {
    case DType::kBFloat16:
      return make(Constant<DType::kBFloat16>{});
    case DType::kFloat16:
      return make(Constant<DType::kFloat16>{});
    case DType::kFloat32:
      break;
  }
  return make(Constant<DType::kFloat32>{});
}

}  // namespace
}  // namespace hf_tiered_cache
