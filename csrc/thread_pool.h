// Our own threads, so that nothing is shared with torch's OpenMP team (its size, its spinning).
#pragma once

#include <cstddef>
#include <cstdint>

namespace hf_tiered_cache {

using WorkFunction = void (*)(void* context, int64_t item);

// Run work(context, item) once for every item in [0, num_items) on up to num_threads threads, the
// calling thread among them; return when all are done. Items are claimed one by one, so a thread
// that loses its CPU costs little. A call made while another thread's call runs goes on in its own
// thread until that one has ended. Safe after fork. `work` must not throw.
void parallel_for(int num_threads, int64_t num_items, WorkFunction work, void* context);

// How long the threads stay awake for the next call after one of the calling thread's; 50 by
// default. For a thread that calls again so soon that waking up would cost more.
void keep_workers_awake(int64_t microseconds);

// Memory of the calling thread, 64-byte aligned, kept and grown; contents undefined. The two kinds
// do not overlap: kShared for what a call shares with its workers, kWorker for one item's needs.
enum class Scratch : int { kShared = 0, kWorker = 1 };
void* scratch(Scratch kind, size_t num_bytes);

}  // namespace hf_tiered_cache
