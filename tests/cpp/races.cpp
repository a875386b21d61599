// Everything of the CPU core that runs in threads, for ThreadSanitizer: kernels called by two
// threads at once over the workers, the attention worker behind flags, disk moves behind one
// another. Says whether the results are right, too.
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "attention_worker.h"
#include "block_io.h"
#include "paged_attention.h"
#include "thread_pool.h"

using namespace hf_tiered_cache;

namespace {

constexpr int kHeads = 4, kDim = 16, kBlockTokens = 16, kColumns = 12, kRounds = 60;

// One sequence of random keys and values, a query, and what comes of it.
struct Layer {
  explicit Layer(unsigned seed) : blocks(kColumns * kPlane * 2), query(kHeads * kDim) {
    srand(seed);
    for (float& value : blocks) value = static_cast<float>(rand() % 1000) / 500 - 1;
    for (float& value : query) value = static_cast<float>(rand() % 1000) / 500 - 1;
    for (int column = 0; column < kColumns; ++column) table[column] = column;
  }

  AttentionParams call(int num_threads) {
    AttentionParams p = {};
    p.dtype = DType::kFloat32;
    p.num_threads = num_threads;
    p.batch = 1;
    p.heads = kHeads;
    p.queries = 1;
    p.query = query.data();
    p.query_stride[0] = p.query_stride[1] = p.query_stride[2] = kDim;
    p.view = {reinterpret_cast<const uint8_t*>(blocks.data()), kPlane * 2 * 4, kColumns, kHeads,
              kBlockTokens, kDim, kDim, table, kColumns, kColumns};
    p.kv_tokens = kColumns * kBlockTokens;
    p.query_start = p.kv_tokens - 1;
    p.scale = 0.25f;
    return p;
  }

  static constexpr int kPlane = kHeads * kBlockTokens * kDim;
  std::vector<float> blocks, query;
  int32_t table[kColumns];
};

struct State {
  std::vector<float> acc = std::vector<float>(kHeads * kDim), max = std::vector<float>(kHeads),
                     sum = std::vector<float>(kHeads);
  RunningStateRows rows() { return {acc.data(), max.data(), sum.data()}; }
};

const Kernels* kernels() {
  for (int i = 0; i < num_kernels(); ++i) {
    if (kernel_choice(i).reason == nullptr) return kernel_choice(i).kernels;
  }
  std::abort();
}

State attended(Layer& layer, int num_threads) {
  State state;
  for (float& value : state.max) value = -INFINITY;
  AttentionParams call = layer.call(num_threads);
  call.state = state.rows();
  kernels()->attend(call);
  return state;
}

bool attend_from_two_threads() {
  std::atomic<bool> is_right{true};
  auto work = [&](unsigned seed) {
    Layer layer(seed);
    const State expected = attended(layer, 1);
    for (int i = 0; i < kRounds; ++i) {
      if (attended(layer, 3).acc != expected.acc) is_right = false;
    }
  };
  std::thread other(work, 1);
  work(2);
  other.join();
  return is_right;
}

bool attend_behind_flags() {
  Layer layer(3);
  const State expected = attended(layer, 1);
  std::vector<uint32_t> words(2);
  AttentionWorker worker;
  bool is_right = true;
  for (uint32_t number = 1; number <= kRounds; ++number) {
    State state;
    auto job = std::make_shared<AttentionJob>();
    job->kernels = kernels();
    AttentionParams call = layer.call(2);
    call.state = state.rows();
    job->calls.push_back(call);
    job->state = state.rows();
    job->num_rows = kHeads;
    job->value_dim = kDim;
    job->ready = {&words[0], number};
    job->done = {&words[1], number};
    worker.submit(job);
    __atomic_store_n(&words[0], number, __ATOMIC_RELEASE);
    while (!worker.wait(*job, 0.01)) {
    }
    is_right = is_right && job->error.empty() && state.acc == expected.acc;
  }
  worker.close();
  return is_right;
}

bool move_records() {
  char path[] = "/tmp/hf_tiered_cache_races_XXXXXX";
  const int fd = mkstemp(path);
  unlink(path);
  BlockIO io(3);
  std::atomic<bool> is_right{fd >= 0};
  auto work = [&](int64_t user) {
    io.enter(user);
    std::vector<char> data(8192), back(8192);
    for (int i = 0; i < kRounds; ++i) {
      data.assign(data.size(), static_cast<char>(i + user));
      const std::vector<iovec> from{{data.data(), data.size()}}, to{{back.data(), back.size()}};
      auto store = std::make_shared<Move>(from, true, false);
      auto load = std::make_shared<Move>(to, false, false);
      store->fd = load->fd = fd;
      store->offset = load->offset = user * 8192;
      load->after.push_back(store);
      io.submit(store);
      io.submit(load);
      while (!io.wait(*load, std::chrono::milliseconds(10))) {
      }
      if (back != data || store->checksums[0] != load->checksums[0]) is_right = false;
    }
    io.leave(user);
  };
  std::thread other(work, 1);
  work(2);
  other.join();
  close(fd);
  return is_right;
}

}  // namespace

int main() {
  keep_workers_awake(200);
  const bool kernels_are = attend_from_two_threads(), worker_is = attend_behind_flags(),
             moves_are = move_records();
  std::printf("kernels %d, attention worker %d, moves %d\n", kernels_are, worker_is, moves_are);
  return !(kernels_are && worker_is && moves_are);
}
