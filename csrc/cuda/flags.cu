// Flags in mapped host memory: how a stream and a host thread hand work to each other without
// either blocking the interpreter. The driver's own stream operations, found at run time: the
// extension must load where there is no driver.
#include <cuda.h>

#include "launch.cuh"

namespace hf_tiered_cache {
namespace {

using ValueOperation = CUresult(CUDAAPI*)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

cudaError_t find(const char* name, ValueOperation* operation) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = {};
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;  // of the driver's interface that is meant
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorSymbolNotFound;
  *operation = reinterpret_cast<ValueOperation>(function);
  return cudaSuccess;
}

CudaStatus enqueue(CudaPlace place, const char* name, void* host_word, uint32_t value,
                   unsigned flags) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  ValueOperation operation = nullptr;
  cudaError_t error = find(name, &operation);
  if (error != cudaSuccess) return status_of(error);
  void* device_word = nullptr;
  error = cudaHostGetDevicePointer(&device_word, host_word, 0);
  if (error != cudaSuccess) return status_of(error);
  const CUresult result = operation(static_cast<CUstream>(place.stream),
                                    reinterpret_cast<CUdeviceptr>(device_word), value, flags);
  if (result == CUDA_SUCCESS) return {0, ""};
  return {static_cast<int>(result), "the driver refused the stream's memory operation"};
}

}  // namespace

CudaStatus htc_cuda_write_flag(CudaPlace place, void* host_word, uint32_t value) {
  // The default also orders everything that the stream did before.
  return enqueue(place, "cuStreamWriteValue32", host_word, value, CU_STREAM_WRITE_VALUE_DEFAULT);
}

CudaStatus htc_cuda_wait_flag(CudaPlace place, void* host_word, uint32_t value) {
  return enqueue(place, "cuStreamWaitValue32", host_word, value, CU_STREAM_WAIT_VALUE_GEQ);
}

}  // namespace hf_tiered_cache
