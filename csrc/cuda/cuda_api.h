// The door to the CUDA core: raw device pointers, strides, a device and a stream. No torch, no
// Python. The meaning is hf_tiered_cache/kernels/reference.py, the structs are those of the CPU
// core; what they point to lies on the device unless said otherwise.
//
// Every function makes its device current for the call, works on the given stream alone, and
// returns before the work is done. Nothing is allocated and nothing waits.
#pragma once

#include "../paged_attention.h"

namespace hf_tiered_cache {

// What came of a call: 0, or the number of an error and what it says (a text that never dies).
struct CudaStatus {
  int code;
  const char* text;
};

struct CudaPlace {
  int device;
  void* stream;  // a cudaStream_t
};

struct JoinParams {
  int64_t rows;  // batch x heads x queries
  int64_t value_dim;
  RunningStateRows state;
  RunningStateRows other;  // over other positions; stays as it is
};

// Host memory must be pinned for a copy to run beside the host.
enum class CopyDirection : int { kHostToDevice = 0, kDeviceToHost = 1, kDeviceToDevice = 2 };

// `count` pieces from sources[i] to targets[i]; the arrays are read during the call.
struct CopyParams {
  CopyDirection direction;
  bool is_pinned;  // the host memory, so that a kernel may read and write it
  int64_t count;
  void* const* targets;
  const void* const* sources;
  const int64_t* num_bytes;
};

struct DeviceProperties {
  char name[256];
  char pci_bus_id[32];
  int major;  // of the compute capability
  int minor;
  int num_multiprocessors;
  int64_t memory_bytes;
};

extern "C" {

// `count` is 0 when the status is an error.
CudaStatus htc_cuda_device_count(int* count);
CudaStatus htc_cuda_device_properties(int device, DeviceProperties* properties);

// Bytes of device memory that `htc_cuda_attend` needs for partials; bounded however much is
// attended. Looks at sizes only; `has_state`: whether the call folds into a running state.
int64_t htc_cuda_scratch_bytes(const AttentionParams* params, bool has_state);
// A slot outside the slab is not read: its rows become NaN.
CudaStatus htc_cuda_attend(CudaPlace place, const AttentionParams* params, void* scratch,
                           int64_t scratch_bytes);
CudaStatus htc_cuda_finish(CudaPlace place, const FinishParams* params);
CudaStatus htc_cuda_join(CudaPlace place, const JoinParams* params);
// A slot outside the slab is not written.
CudaStatus htc_cuda_append(CudaPlace place, const AppendParams* params);

CudaStatus htc_cuda_copy(CudaPlace place, const CopyParams* params);

// Between the device and pinned host memory, by a kernel: some KiB that must not queue behind the
// copies that the copy engines are at.
CudaStatus htc_cuda_post(CudaPlace place, void* target, const void* source, int64_t num_bytes);

// A 32-bit word of mapped host memory as a flag between the stream and host threads. The stream
// sets it once everything before is done and visible; the stream waits until it is `value` or more
// (in the cyclic order of int32).
CudaStatus htc_cuda_write_flag(CudaPlace place, void* host_word, uint32_t value);
CudaStatus htc_cuda_wait_flag(CudaPlace place, void* host_word, uint32_t value);

}  // extern "C"

}  // namespace hf_tiered_cache
