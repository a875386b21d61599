// Which devices there are.
#include <cstring>

#include "launch.cuh"

namespace hf_tiered_cache {

CudaStatus htc_cuda_device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error == cudaSuccess) return {0, ""};
  *count = 0;
  cudaGetLastError();  // it would be reported by the next call of anyone in the process
  return status_of(error);
}

CudaStatus htc_cuda_device_properties(int device, DeviceProperties* properties) {
  cudaDeviceProp all = {};
  cudaError_t error = cudaGetDeviceProperties(&all, device);
  if (error != cudaSuccess) return status_of(error);
  error = cudaDeviceGetPCIBusId(properties->pci_bus_id, sizeof properties->pci_bus_id, device);
  if (error != cudaSuccess) return status_of(error);
  std::memcpy(properties->name, all.name, sizeof properties->name);
  properties->major = all.major;
  properties->minor = all.minor;
  properties->num_multiprocessors = all.multiProcessorCount;
  properties->memory_bytes = static_cast<int64_t>(all.totalGlobalMem);
  return {0, ""};
}

}  // namespace hf_tiered_cache
