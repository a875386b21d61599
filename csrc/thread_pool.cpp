#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace hf_tiered_cache {
namespace {

using Spin = std::chrono::microseconds;
constexpr Spin kSpin{50};  // longer than the gap inside one layer
thread_local Spin spin_of_caller = kSpin;

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

#if defined(__linux__)
std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof(set), &set);  // a refusal only costs speed
}
#endif

// A job is open while items may still be claimed. Workers enter and leave it under the mutex, so
// the caller can close it without waiting for a worker that never woke up.
class ThreadPool {
 public:
  void run(int num_threads, int64_t num_items, WorkFunction work, void* context) {
    // While another call has the workers this one goes on alone, and takes them when it ends.
    std::unique_lock<std::mutex> caller(caller_mutex_, std::try_to_lock);
    int64_t first = 0;
    for (; !caller.owns_lock(); ++first) {
      if (first == num_items) return;
      work(context, first);
      caller.try_lock();
    }
    grow(num_threads - 1);
    keep_workers_off_this_cpu();
    spin_.store(spin_of_caller, std::memory_order_relaxed);
    next_item_.store(first, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(job_mutex_);
      work_ = work;
      context_ = context;
      num_items_ = num_items;
      job_workers_ = num_threads - 1;
      is_open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    job_ready_.notify_all();
    claim_items(work, context, num_items);
    {
      std::lock_guard<std::mutex> lock(job_mutex_);
      is_open_ = false;
    }
    for (int round = 0; num_inside_.load(std::memory_order_acquire) != 0; ++round) {
      // A worker still has an item. Let it have this CPU if it lost its own.
      if (round < 4000) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void claim_items(WorkFunction work, void* context, int64_t num_items) {
    for (;;) {
      const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
      if (item >= num_items) return;
      work(context, item);
    }
  }

  void grow(int num_workers) {
    while (num_workers_ < num_workers) {
      const int index = num_workers_++;
      std::thread worker([this, index] { serve(index); });
#if defined(__linux__)
      handles_.push_back(worker.native_handle());
      worker_cpu_.push_back(-1);
      is_pinned_ = false;
#endif
      // Never joined: the pool is never destroyed, and at exit its threads end with the process.
      worker.detach();
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      wait_for_job(seen);
      WorkFunction work = nullptr;
      void* context = nullptr;
      int64_t num_items = 0;
      {
        std::lock_guard<std::mutex> lock(job_mutex_);
        seen = generation_.load(std::memory_order_relaxed);
        if (!is_open_ || index >= job_workers_) continue;
        num_inside_.fetch_add(1, std::memory_order_relaxed);
        work = work_;
        context = context_;
        num_items = num_items_;
      }
      claim_items(work, context, num_items);
      num_inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_job(uint64_t seen) {
    const auto sleep_at =
        std::chrono::steady_clock::now() + spin_.load(std::memory_order_relaxed);
    while (std::chrono::steady_clock::now() < sleep_at) {
      for (int i = 0; i < 16; ++i) {
        if (generation_.load(std::memory_order_acquire) != seen) return;
        pause_briefly();
      }
    }
    std::unique_lock<std::mutex> lock(job_mutex_);
    job_ready_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
  }

  // Workers are pinned one per CPU of the process's mask; the caller, which is not ours to pin,
  // moves as it likes. Two of them on one CPU would halve the speed, so a worker found on the
  // caller's CPU is given the CPU that the caller left.
  void keep_workers_off_this_cpu() {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here < 0) return;
    if (!is_pinned_) {
      const std::vector<int> cpus = allowed_cpus();
      is_pinned_ = true;
      free_cpu_ = -1;
      if (static_cast<int>(cpus.size()) <= num_workers_) {
        // More threads than CPUs: leave the placement to the system.
        for (int& cpu : worker_cpu_) cpu = -1;
        return;
      }
      size_t next = 0;
      for (int i = 0; i < num_workers_; ++i) {
        if (cpus[next] == here) ++next;
        worker_cpu_[i] = cpus[next++];
        pin(handles_[i], worker_cpu_[i]);
      }
      free_cpu_ = here;
      return;
    }
    if (here == free_cpu_ || free_cpu_ < 0) return;
    for (int i = 0; i < num_workers_; ++i) {
      if (worker_cpu_[i] == here) {
        worker_cpu_[i] = free_cpu_;
        pin(handles_[i], free_cpu_);
      }
    }
    free_cpu_ = here;
#endif
  }

  std::mutex caller_mutex_;  // held by the one call that may use the workers
  int num_workers_ = 0;
#if defined(__linux__)
  std::vector<pthread_t> handles_;
  std::vector<int> worker_cpu_;
  bool is_pinned_ = false;
  int free_cpu_ = -1;
#endif

  std::mutex job_mutex_;
  std::condition_variable job_ready_;
  std::atomic<uint64_t> generation_{0};
  bool is_open_ = false;
  int job_workers_ = 0;
  WorkFunction work_ = nullptr;
  void* context_ = nullptr;
  int64_t num_items_ = 0;

  std::atomic<Spin> spin_{kSpin};  // as the last caller wished

  alignas(64) std::atomic<int64_t> next_item_{0};
  alignas(64) std::atomic<int> num_inside_{0};
};

// Replaced in a forked child, whose parent's workers do not exist; the old one is left alone.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool* current_pool() {
  ThreadPool* now = pool.load(std::memory_order_acquire);
  if (now != nullptr) return now;
  auto* fresh = new ThreadPool();
  if (pool.compare_exchange_strong(now, fresh, std::memory_order_acq_rel)) {
#if defined(__linux__) || defined(__APPLE__)
    static std::once_flag registered;
    std::call_once(registered, [] {
      pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    });
#endif
    return fresh;
  }
  delete fresh;
  return now;
}

struct ThreadScratch {
  void* memory[2] = {nullptr, nullptr};
  size_t capacity[2] = {0, 0};
  ~ThreadScratch() {
    std::free(memory[0]);
    std::free(memory[1]);
  }
};

}  // namespace

void parallel_for(int num_threads, int64_t num_items, WorkFunction work, void* context) {
  if (num_items < num_threads) num_threads = static_cast<int>(num_items);
  if (num_threads <= 1) {
    for (int64_t item = 0; item < num_items; ++item) work(context, item);
    return;
  }
  current_pool()->run(num_threads, num_items, work, context);
}

void keep_workers_awake(int64_t microseconds) { spin_of_caller = Spin(microseconds); }

void* scratch(Scratch kind, size_t num_bytes) {
  thread_local ThreadScratch mine;
  const int index = static_cast<int>(kind);
  if (mine.capacity[index] < num_bytes) {
    std::free(mine.memory[index]);
    mine.memory[index] = nullptr;
    mine.capacity[index] = 0;
    const size_t rounded = (num_bytes + 4095) / 4096 * 4096;
    mine.memory[index] = std::aligned_alloc(64, rounded);
    if (mine.memory[index] == nullptr) throw std::bad_alloc();
    mine.capacity[index] = rounded;
  }
  return mine.memory[index];
}

}  // namespace hf_tiered_cache
