// One CUDA block at a time; its threads are fibers. Whichever fiber may run is chosen at random,
// so a missing barrier shows as a wrong or a changing result. What real hardware would forgive is
// an error here: exchanges and barriers that not all threads reach, writes behind the shared
// memory asked for. Shared memory starts as NaN.
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <chrono>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

constexpr size_t kMaxSharedBytes = 48 << 10;  // what a kernel gets without asking for more
constexpr size_t kCanaryBytes = 4 << 10;
alignas(16) unsigned char shared_memory[kMaxSharedBytes + kCanaryBytes];
dim3 threadIdx;
dim3 blockIdx;

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarpLanes = 32;
constexpr size_t kStackBytes = 256 << 10;  // touched only as far as it is used
constexpr unsigned char kPoison = 0xff;

// ---- fibers -------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Fiber {
  void* stack_pointer;
};

struct Warp {
  Exchange kind;
  int arrived;
  int epoch;
  uint64_t brought[2][kWarpLanes];  // a lane may be one exchange ahead of another
};

struct Block {
  int threads;
  int current;
  int late_warp;
  int at_barrier;
  int returned;
  int num_ready;
  int ready[kMaxThreads];
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / kWarpLanes];
  void* scheduler;
  void (*body)(void*);
  void* context;
  std::string error;
};

Block block;
unsigned char* stacks = nullptr;
std::mutex mutex;
uint64_t random_state = 1;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// Any of the fibers that may run; the scheduler if none may. One warp of the block runs only when
// hardly anyone else may: so the others get far ahead of it.
void* next_to_run() {
  if (block.num_ready == 0 || !block.error.empty()) return block.scheduler;
  int pick;
  for (int tries = 0; tries < 16; ++tries) {
    pick = static_cast<int>((random_number() >> 32) * block.num_ready >> 32);
    if (block.ready[pick] / kWarpLanes != block.late_warp) break;
  }
  block.current = block.ready[pick];
  block.ready[pick] = block.ready[--block.num_ready];
  threadIdx.x = block.current;
  return block.fibers[block.current].stack_pointer;
}

void yield() {
  void** save = &block.fibers[block.current].stack_pointer;
  emulation_switch(save, next_to_run());
}

void make_ready(int thread) { block.ready[block.num_ready++] = thread; }

[[noreturn]] void fail(const char* why) {
  if (block.error.empty()) block.error = why;
  yield();
  __builtin_unreachable();
}

void run_fiber() {
  block.body(block.context);
  ++block.returned;
  yield();
}

void start_fiber(int thread) {
  // The frame that emulation_switch pops: six registers and the address it returns to, with the
  // stack aligned as at the entry of a function.
  auto* top = reinterpret_cast<void**>(stacks + (thread + 1) * kStackBytes);
  void** frame = top - 8;
  for (int i = 0; i < 6; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(&run_fiber);
  block.fibers[thread].stack_pointer = frame;
  make_ready(thread);
}

void run_block() {
  block.num_ready = block.at_barrier = block.returned = 0;
  block.late_warp = static_cast<int>(random_number() % (block.threads / kWarpLanes));
  for (int warp = 0; warp < block.threads / kWarpLanes; ++warp) block.warps[warp] = {};
  for (int thread = 0; thread < block.threads; ++thread) start_fiber(thread);
  while (block.error.empty() && block.returned < block.threads) {
    if (block.num_ready == 0) {
      if (block.at_barrier != block.threads) {
        block.error = "emulation: some threads wait where others never come";
        return;
      }
      block.at_barrier = 0;
      for (int thread = 0; thread < block.threads; ++thread) make_ready(thread);
    }
    emulation_switch(&block.scheduler, next_to_run());
  }
}

Warp& meet(Exchange kind, uint64_t bits) {
  const int thread = block.current;
  Warp& warp = block.warps[thread / kWarpLanes];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("emulation: lanes of a warp are in different exchanges");
  warp.brought[warp.epoch % 2][thread % kWarpLanes] = bits;
  if (++warp.arrived < kWarpLanes) {
    yield();
    return warp;
  }
  warp.arrived = 0;
  ++warp.epoch;
  const int first = thread / kWarpLanes * kWarpLanes;
  for (int other = first; other < first + kWarpLanes; ++other) {
    if (other != thread) make_ready(other);
  }
  return warp;
}

}  // namespace

uint64_t exchange(Exchange kind, uint64_t bits, int source) {
  const int epoch = block.warps[block.current / kWarpLanes].epoch;
  return meet(kind, bits).brought[epoch % 2][source];
}

uint32_t vote(bool holds) {
  const int epoch = block.warps[block.current / kWarpLanes].epoch;
  const Warp& warp = meet(Exchange::kBallot, holds);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    votes |= static_cast<uint32_t>(warp.brought[epoch % 2][lane]) << lane;
  }
  return votes;
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  float (*widen)(uint16_t)) {
  struct Operands {
    const uint32_t* a;
    const uint32_t* b;
  };
  const Operands own = {a, b};
  const int epoch = block.warps[block.current / kWarpLanes].epoch;
  const uint64_t* all =
      meet(Exchange::kMultiplyAdd, reinterpret_cast<uint64_t>(&own)).brought[epoch % 2];
  // Element `k` of row `row` of a, of column `column` of b.
  const auto element = [&](const uint32_t* words, int word, int k) {
    return static_cast<double>(widen(static_cast<uint16_t>(words[word] >> k % 2 * 16)));
  };
  const auto of_a = [&](int row, int k) {
    const auto* lane = reinterpret_cast<const Operands*>(all[row % 8 * 4 + k % 8 / 2]);
    return element(lane->a, row / 8 + k / 8 * 2, k);
  };
  const auto of_b = [&](int column, int k) {
    const auto* lane = reinterpret_cast<const Operands*>(all[column * 4 + k % 8 / 2]);
    return element(lane->b, k / 8, k);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8;
    const int column = lane() % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) sum += of_a(row, k) * of_b(column, k);
    c[i] = static_cast<float>(c[i] + sum);
  }
  meet(Exchange::kMultiplyAdd, 0);  // the operands of all lanes stay until all have read them
}

void check_mask(uint32_t mask) {
  if (mask != 0xffffffffu) fail("emulation: an exchange of some lanes only");
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(void*), void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  const dim3 grid = config.gridDim;
  const unsigned threads = config.blockDim.x;
  block.error.clear();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      threads % kWarpLanes != 0 || threads > kMaxThreads || threads == 0 ||
      config.dynamicSmemBytes > kMaxSharedBytes) {
    block.error = "emulation: an impossible launch";
    return cudaErrorInvalidValue;
  }
  if (stacks == nullptr) {
    stacks =
        static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block.threads = static_cast<int>(threads);
  block.body = body;
  block.context = context;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::memset(shared_memory, kPoison, config.dynamicSmemBytes + kCanaryBytes);
        run_block();
        const unsigned char* canary = shared_memory + config.dynamicSmemBytes;
        if (canary[0] != kPoison || std::memcmp(canary, canary + 1, kCanaryBytes - 1) != 0) {
          block.error = "emulation: a write behind the shared memory";
        }
        if (!block.error.empty()) return cudaErrorLaunchFailure;
      }
    }
  }
  return cudaSuccess;
}

// The order of threads from here on; the tests call it.
extern "C" __attribute__((visibility("default"))) void emulation_set_seed(uint64_t seed) {
  random_state = seed * 2654435761u + 1;
}

// What was copied since the last call of this: (single copies, batches, pieces in batches).
int num_copies[3];
extern "C" __attribute__((visibility("default"))) void emulation_take_copies(int* counts) {
  std::memcpy(counts, num_copies, sizeof num_copies);
  std::memset(num_copies, 0, sizeof num_copies);
}

}  // namespace emulation

void __syncthreads() {
  using emulation::block;
  ++block.at_barrier;
  emulation::yield();
}

// ---- the runtime --------------------------------------------------------------------------------

namespace {
thread_local int current_device = 0;
constexpr int kNumDevices = 2;
}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  text = emulation::block.error.empty() ? "emulation: error " + std::to_string(error)
                                        : emulation::block.error;
  return text.c_str();
}
cudaError_t last_error = cudaSuccess;
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
extern "C" __attribute__((visibility("default"))) int emulation_take_error() {
  return cudaGetLastError();
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = kNumDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kNumDevices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= kNumDevices) return cudaErrorInvalidDevice;
  *properties = {"an emulated device", 9, 0, 1, size_t{1} << 30};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  std::snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  ++emulation::num_copies[0];
  return cudaSuccess;
}
cudaError_t batch_refusal = cudaSuccess;
extern "C" __attribute__((visibility("default"))) void emulation_refuse_batches(int error) {
  batch_refusal = static_cast<cudaError_t>(error);
}
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const size_t* bytes,
                                 size_t count, cudaMemcpyAttributes* attributes,
                                 size_t* attribute_indices, size_t num_attributes,
                                 cudaStream_t stream) {
  if (stream == nullptr || num_attributes != 1 || attribute_indices[0] != 0 ||
      attributes->srcAccessOrder < cudaMemcpySrcAccessOrderStream) {
    return cudaErrorInvalidValue;
  }
  if (batch_refusal != cudaSuccess) return last_error = batch_refusal;
  // In no particular order.
  for (size_t i = count; i-- > 0;) std::memcpy(to[i], from[i], bytes[i]);
  ++emulation::num_copies[1];
  emulation::num_copies[2] += static_cast<int>(count);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

namespace {
CUresult write_value(CUstream, CUdeviceptr address, cuuint32_t value, unsigned) {
  __atomic_store_n(reinterpret_cast<cuuint32_t*>(address), value, __ATOMIC_RELEASE);
  return CUDA_SUCCESS;
}
CUresult wait_value(CUstream, CUdeviceptr address, cuuint32_t value, unsigned flags) {
  if (flags != CU_STREAM_WAIT_VALUE_GEQ) return CUDA_ERROR_INVALID_VALUE;
  const auto* word = reinterpret_cast<cuuint32_t*>(address);
  while (static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) < 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return CUDA_SUCCESS;
}
}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const std::string name(symbol);
  *function = nullptr;
  if (name == "cuStreamWriteValue32") *function = reinterpret_cast<void*>(&write_value);
  if (name == "cuStreamWaitValue32") *function = reinterpret_cast<void*>(&wait_value);
  if (*function == nullptr) return cudaErrorSymbolNotFound;
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
