// A thread that attends blocks in host memory beside a device: it waits until a flag says that the
// query is there, attends, and raises another flag when the state is. The flags are words of memory
// that both can see; who writes the one and reads the other is not known here.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "paged_attention.h"

namespace hf_tiered_cache {

// Flags count up and wrap: one is raised to `value` when it is at most 2^31 - 1 beyond it.
struct Flag {
  uint32_t* word;
  uint32_t value;
};

struct AttentionJob {
  const Kernels* kernels;
  std::vector<AttentionParams> calls;  // in order, all into one state
  RunningStateRows state;              // begun anew by the job
  int64_t num_rows;                    // batch * heads * queries of the state
  int64_t value_dim;
  Flag ready;  // of the query
  Flag done;   // of the state; raised whatever happens, so that nobody waits for ever

  std::atomic<bool> is_done{false};
  bool was_cancelled = false;
  std::string error;  // empty: none
  double seconds = 0.0;
};

class AttentionWorker {
 public:
  ~AttentionWorker() { close(); }

  // Start the thread if it does not run, and queue a job behind those before it.
  void submit(std::shared_ptr<AttentionJob> job);

  // Return when `job` is done, or after `timeout_seconds`; whether it is done.
  bool wait(const AttentionJob& job, double timeout_seconds);

  // Let the job under way end, cancel those that wait for their flag or their turn. Idempotent.
  void close();

 private:
  void serve();
  void look_for_job(uint64_t num_served) const;
  bool wait_until_raised(const Flag& flag) const;
  static void run(AttentionJob& job);
  void end(AttentionJob& job);

  std::thread thread_;
  int process_ = 0;  // in which the thread runs
  std::mutex mutex_;
  std::condition_variable has_job_;
  std::condition_variable job_ended_;
  std::deque<std::shared_ptr<AttentionJob>> jobs_;
  std::atomic<uint64_t> num_submitted_{0};
  std::atomic<bool> is_stopping_{false};
};

}  // namespace hf_tiered_cache
