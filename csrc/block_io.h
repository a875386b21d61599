// Threads that move records between memory and a file, and make the checksums of what they moved.
// They know no slots and no Python: descriptors, addresses, bytes. They also pack blocks on their
// way to the file and unpack them on their way back.
//
// Threads and not io_uring: a bare ring (plain and registered buffers) read 1 MiB and 256 KiB
// records under O_DIRECT at 0.9 to 1.0 times the rate of as many threads with pread, at queue depths
// 4 and 8 (medians of 5 rounds in turn, Linux 6.18). It saves 0.03 of 0.08 CPU seconds per GB, and
// the checksums would need a thread all the same.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "paged_attention.h"

namespace hf_tiered_cache {

// `Move::error` is an errno, or one of these.
constexpr int kEndOfFile = -1;  // nothing more came through
constexpr int kCancelled = -2;  // its turn never came, or a move it had to follow failed
constexpr int kUnpackable = -3;  // a record that was to be packed cannot be; nothing was written

// How blocks in memory become records of a file, and records blocks again.
struct Packing {
  const Kernels* kernels = nullptr;  // null: they are the same bytes
  PackParams shape = {};
  std::size_t record_bytes = 0;
};

// Consecutive records of a file to be moved in one go, and what came of it. The owner keeps the
// memory of the records until `is_done`. All that a thread needs but aligned memory is allocated
// here, by the owner's thread.
struct Move {
  Move(std::vector<iovec> records, bool is_write, bool is_direct, Packing packing)
      : is_write(is_write),
        is_direct(is_direct),
        packing(packing),
        records(std::move(records)),
        left(this->records),
        checksums(this->records.size()) {}

  bool is_write = false;
  bool is_direct = false;  // the descriptor wants offsets and memory in multiples of 4096
  Packing packing;
  int fd = -1;
  int64_t offset = 0;
  std::vector<iovec> records;  // in memory
  std::vector<std::shared_ptr<Move>> after;  // end before this one begins; were submitted before

  // Written by one thread before `is_done`, never after.
  std::vector<iovec> left;  // what did not go through yet
  int error = 0;
  int64_t error_offset = 0;  // where it stood still
  std::vector<std::array<unsigned char, 16>> checksums;  // one a record; nothing if there is an error
  std::chrono::steady_clock::time_point began, ended;    // of its thread at work, if one was

  bool is_taken = false;  // by a thread, or cancelled; under the lock of the `BlockIO`
  std::atomic<bool> is_done{false};
};

// Starts moves in the order of `submit`, `num_threads` at a time, while somebody uses it. A forked
// child must not use it, but may destroy it.
//
// The threads neither throw nor catch: what a fresh thread allocates for that (its own variables of
// a library that was loaded late) ends the process when there is no memory for it.
class BlockIO {
 public:
  explicit BlockIO(int num_threads);
  ~BlockIO();
  BlockIO(const BlockIO&) = delete;
  BlockIO& operator=(const BlockIO&) = delete;

  // `user` uses it from now on: starts the threads, unless they run. Throws std::system_error when
  // not even one starts; nobody uses it more than before then.
  void enter(int64_t user);

  // `user` uses it no more: all its moves are done or cancelled. After the last one the threads are
  // joined. Idempotent.
  void leave(int64_t user);

  void submit(std::shared_ptr<Move> move);

  // Ends `move` unless a thread has it already.
  void cancel(Move& move);

  // Whether `move` is done, after at most `timeout`.
  bool wait(const Move& move, std::chrono::duration<double> timeout);

  // How many threads run.
  int num_threads();

 private:
  struct Crew;
  struct State;
  static void work(State* state, Crew* crew);
  void dismiss_if_unused();

  const int most_threads_;
  const pid_t pid_;
  std::unique_ptr<State> state_;
};

}  // namespace hf_tiered_cache
