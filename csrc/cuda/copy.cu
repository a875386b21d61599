// Copies between slots of the host and of the device. Pieces that are neighbours on both sides, in
// whatever order they are given, become one run (H200: 1 MiB goes at 48 GB/s, 4 MiB at 53, 16 at
// 55); what a run costs decides how it goes:
//
//   16 MiB and more    cudaMemcpyAsync: the call (some microseconds) is nothing
//   28 KiB to 16 MiB   one cudaMemcpyBatchAsync for all of them
//   below 28 KiB       a kernel: the copy engine falls to 5-7 GB/s there (H100)
//
// Memory that is not pinned is copied run by run. What CUDA refuses as invalid is tried once more
// piece by piece: a copy may not cross from one range that was registered into the next, and which
// neighbours lie in different ones is not known here.
//
// Runs from the host may be read in any order: full blocks never change. Runs from the device are
// read in the order of the stream, or they would race with what still writes them.
#include <algorithm>
#include <vector>

#include "block.cuh"
#include "launch.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int64_t kLargeBytes = 16 << 20;
constexpr int64_t kSmallBytes = 28 << 10;
constexpr int64_t kPostBytes = 4 << 10;
constexpr int kGatherThreads = 256;
constexpr int kGatherRuns = 128;  // as kernel arguments: 3 KiB of 4

struct Run {
  uint8_t* target;
  const uint8_t* source;
  int64_t num_bytes;
};

struct GatherCall {
  Run runs[kGatherRuns];
};

template <class Word>
__device__ void CopyRun(const Run& run) {
  auto* to = reinterpret_cast<Word*>(run.target);
  const auto* from = reinterpret_cast<const Word*>(run.source);
  const int64_t words = run.num_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = threadIdx.x; i < words; i += kGatherThreads) to[i] = from[i];
}

// One CUDA block per run.
__global__ void __launch_bounds__(kGatherThreads)
    GatherKernel(const __grid_constant__ GatherCall call) {
  const Run& run = call.runs[blockIdx.x];
  const auto bits = reinterpret_cast<uintptr_t>(run.target) |
                    reinterpret_cast<uintptr_t>(run.source) | run.num_bytes;
  if (bits % sizeof(uint4) == 0) {
    CopyRun<uint4>(run);
  } else {
    CopyRun<uint8_t>(run);
  }
}

std::vector<Run> pieces_of(const CopyParams& p) {
  std::vector<Run> pieces;
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.num_bytes[i] == 0) continue;
    pieces.push_back({static_cast<uint8_t*>(p.targets[i]),
                      static_cast<const uint8_t*>(p.sources[i]), p.num_bytes[i]});
  }
  return pieces;
}

std::vector<Run> merged(std::vector<Run> pieces) {
  // Targets do not overlap, so their order is free: neighbours come together.
  std::sort(pieces.begin(), pieces.end(),
            [](const Run& a, const Run& b) { return a.target < b.target; });
  std::vector<Run> runs;
  for (const Run& piece : pieces) {
    if (!runs.empty() && runs.back().target + runs.back().num_bytes == piece.target &&
        runs.back().source + runs.back().num_bytes == piece.source) {
      runs.back().num_bytes += piece.num_bytes;
    } else {
      runs.push_back(piece);
    }
  }
  return runs;
}

cudaMemcpyKind kind_of(CopyDirection direction) {
  switch (direction) {
    case CopyDirection::kHostToDevice:
      return cudaMemcpyHostToDevice;
    case CopyDirection::kDeviceToHost:
      return cudaMemcpyDeviceToHost;
    case CopyDirection::kDeviceToDevice:
      break;
  }
  return cudaMemcpyDeviceToDevice;
}

cudaError_t copy_each(void* stream, CopyDirection direction, const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    const cudaError_t error =
        cudaMemcpyAsync(run.target, run.source, run.num_bytes, kind_of(direction),
                        static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#if CUDART_VERSION >= 12080
// Whether the driver, which may be older than the runtime, knows no batches.
bool has_no_batches(cudaError_t error) {
  return error == cudaErrorCallRequiresNewerDriver || error == cudaErrorNotSupported ||
         error == cudaErrorInsufficientDriver || error == cudaErrorSymbolNotFound;
}
#endif

cudaError_t copy_batch(void* stream, CopyDirection direction, const std::vector<Run>& runs) {
#if CUDART_VERSION >= 12080
  // The legacy default stream (null) takes no batches.
  if (runs.size() > 1 && stream != nullptr) {
    std::vector<void*> targets;
    std::vector<const void*> sources;
    std::vector<size_t> sizes;
    for (const Run& run : runs) {
      targets.push_back(run.target);
      sources.push_back(run.source);
      sizes.push_back(static_cast<size_t>(run.num_bytes));
    }
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = direction == CopyDirection::kHostToDevice
                                    ? cudaMemcpySrcAccessOrderAny
                                    : cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
#if CUDART_VERSION >= 13000
    const cudaError_t error =
        cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), runs.size(), &attributes,
                             &first, 1, static_cast<cudaStream_t>(stream));
#else
    size_t failed = 0;
    const cudaError_t error = cudaMemcpyBatchAsync(
        targets.data(), const_cast<void**>(sources.data()), sizes.data(), runs.size(), &attributes,
        &first, 1, &failed, static_cast<cudaStream_t>(stream));
#endif
    if (!has_no_batches(error)) return error;
    cudaGetLastError();  // it would be reported by the next call of anyone in the process
  }
#endif
  return copy_each(stream, direction, runs);
}

cudaError_t copy_by_kernel(void* stream, const std::vector<Run>& runs) {
  for (size_t first = 0; first < runs.size(); first += kGatherRuns) {
    GatherCall call = {};
    const size_t count = Min(kGatherRuns, runs.size() - first);
    for (size_t i = 0; i < count; ++i) call.runs[i] = runs[first + i];
    const cudaError_t error = launch(stream, dim3(count), kGatherThreads, 0, &GatherKernel, call);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Each run the way its size asks for.
cudaError_t copy_runs(void* stream, const CopyParams& p, const std::vector<Run>& runs) {
  if (!p.is_pinned && p.direction != CopyDirection::kDeviceToDevice) {
    return copy_each(stream, p.direction, runs);
  }
  std::vector<Run> large, middle, small;
  for (const Run& run : runs) {
    if (run.num_bytes >= kLargeBytes) {
      large.push_back(run);
    } else if (run.num_bytes >= kSmallBytes) {
      middle.push_back(run);
    } else {
      small.push_back(run);
    }
  }
  cudaError_t error = copy_each(stream, p.direction, large);
  if (error == cudaSuccess) error = copy_batch(stream, p.direction, middle);
  if (error == cudaSuccess) error = copy_by_kernel(stream, small);
  return error;
}

}  // namespace

CudaStatus htc_cuda_copy(CudaPlace place, const CopyParams* params) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const std::vector<Run> pieces = pieces_of(*params);
  cudaError_t error = copy_runs(place.stream, *params, merged(pieces));
  if (error == cudaErrorInvalidValue) {
    cudaGetLastError();  // it would be reported by the next call of anyone in the process
    error = copy_each(place.stream, params->direction, pieces);
  }
  return status_of(error);
}

CudaStatus htc_cuda_post(CudaPlace place, void* target, const void* source, int64_t num_bytes) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  std::vector<Run> runs;
  for (int64_t done = 0; done < num_bytes; done += kPostBytes) {
    runs.push_back({static_cast<uint8_t*>(target) + done,
                    static_cast<const uint8_t*>(source) + done, Min(kPostBytes, num_bytes - done)});
  }
  return status_of(copy_by_kernel(place.stream, runs));
}

}  // namespace hf_tiered_cache
