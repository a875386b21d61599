#include "attention_worker.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <utility>

#include "thread_pool.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace hf_tiered_cache {
namespace {

// A device is about a millisecond from one layer to the next: within that, sleeping would cost
// more (some 50 us to wake up) than it saves. So this thread looks for the next job and for its
// flag so long, and the threads that it attends with stay awake.
constexpr auto kSpin = std::chrono::milliseconds(2);
constexpr int64_t kWorkersAwakeMicroseconds = 1000;
constexpr auto kNap = std::chrono::microseconds(50);

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

bool is_raised(const Flag& flag) {
  const uint32_t now = __atomic_load_n(flag.word, __ATOMIC_ACQUIRE);
  return static_cast<int32_t>(now - flag.value) >= 0;
}

}  // namespace

void AttentionWorker::submit(std::shared_ptr<AttentionJob> job) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (is_stopping_.load()) throw std::runtime_error("the attention worker is closed");
  if (!thread_.joinable()) {
    thread_ = std::thread([this] { serve(); });
    process_ = getpid();
  }
  jobs_.push_back(std::move(job));
  num_submitted_.fetch_add(1, std::memory_order_release);
  has_job_.notify_one();
}

bool AttentionWorker::wait(const AttentionJob& job, double timeout_seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return job_ended_.wait_for(lock, std::chrono::duration<double>(timeout_seconds),
                             [&] { return job.is_done.load(std::memory_order_acquire); });
}

void AttentionWorker::close() {
  if (thread_.joinable() && process_ != getpid()) {  // after fork the thread is the parent's
    thread_.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_.store(true);
    has_job_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void AttentionWorker::serve() {
  keep_workers_awake(kWorkersAwakeMicroseconds);
  for (uint64_t num_served = 0;; ++num_served) {
    std::shared_ptr<AttentionJob> job;
    // The first is there already. Whoever waits for the next one longer than a layer takes sleeps.
    if (num_served > 0) look_for_job(num_served);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      has_job_.wait(lock, [this] { return !jobs_.empty() || is_stopping_.load(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    if (wait_until_raised(job->ready)) {
      run(*job);
    } else {
      job->was_cancelled = true;
    }
    end(*job);
  }
}

void AttentionWorker::look_for_job(uint64_t num_served) const {
  const auto sleep_at = std::chrono::steady_clock::now() + kSpin;
  while (num_submitted_.load(std::memory_order_acquire) == num_served &&
         !is_stopping_.load(std::memory_order_relaxed) &&
         std::chrono::steady_clock::now() < sleep_at) {
    for (int i = 0; i < 16; ++i) pause_briefly();
  }
}

// False when the worker is closed first.
bool AttentionWorker::wait_until_raised(const Flag& flag) const {
  const auto nap_at = std::chrono::steady_clock::now() + kSpin;
  while (!is_raised(flag)) {
    if (is_stopping_.load(std::memory_order_relaxed)) return false;
    if (std::chrono::steady_clock::now() < nap_at) {
      for (int i = 0; i < 16; ++i) pause_briefly();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }
  return true;
}

void AttentionWorker::run(AttentionJob& job) {
  const auto start = std::chrono::steady_clock::now();
  std::fill_n(job.state.acc, job.num_rows * job.value_dim, 0.0f);
  std::fill_n(job.state.max, job.num_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(job.state.sum, job.num_rows, 0.0f);
  try {
    for (const AttentionParams& call : job.calls) job.kernels->attend(call);
  } catch (const std::exception& error) {
    job.error = error.what();
  }
  job.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void AttentionWorker::end(AttentionJob& job) {
  __atomic_store_n(job.done.word, job.done.value, __ATOMIC_RELEASE);
  std::lock_guard<std::mutex> lock(mutex_);
  job.is_done.store(true, std::memory_order_release);
  job_ended_.notify_all();
}

}  // namespace hf_tiered_cache
