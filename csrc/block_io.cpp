#include "block_io.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "xxh3.h"

namespace hf_tiered_cache {
namespace {

constexpr int64_t kPage = 4096;
constexpr std::size_t kMaxVectors = 1024;  // IOV_MAX

using Records = std::vector<iovec>;

void make_checksums(Move& move, const Records& records) {
  move.checksums.resize(records.size());
  for (std::size_t i = 0; i < records.size(); ++i) {
    xxh3_128(records[i].iov_base, records[i].iov_len, move.checksums[i].data());
  }
}

// Repeats the system call until every record went through: interrupted calls again, short ones
// from where they stopped, under direct I/O from the last page before that.
void transfer(Move& move, Records left) {
  std::size_t first = 0;
  int64_t offset = move.offset;
  while (first < left.size()) {
    const int count = static_cast<int>(std::min(left.size() - first, kMaxVectors));
    ssize_t num_bytes = move.is_write ? pwritev(move.fd, &left[first], count, offset)
                                      : preadv(move.fd, &left[first], count, offset);
    if (num_bytes < 0 && errno == EINTR) continue;
    if (num_bytes > 0 && move.is_direct) num_bytes -= num_bytes % kPage;
    if (num_bytes <= 0) {
      move.error = num_bytes < 0 ? errno : kEndOfFile;
      move.error_offset = offset;
      return;
    }
    offset += num_bytes;
    while (num_bytes > 0) {
      iovec& record = left[first];
      const std::size_t step = std::min(record.iov_len, static_cast<std::size_t>(num_bytes));
      record.iov_base = static_cast<char*>(record.iov_base) + step;
      record.iov_len -= step;
      num_bytes -= static_cast<ssize_t>(step);
      if (record.iov_len == 0) ++first;
    }
  }
}

bool is_aligned(const iovec& record) {
  return reinterpret_cast<uintptr_t>(record.iov_base) % kPage == 0;
}

// Aligned memory for records of the same sizes.
class AlignedCopy {
 public:
  explicit AlignedCopy(const Records& like) : records_(like) {
    std::size_t num_bytes = 0;
    for (const iovec& record : like) num_bytes += record.iov_len;
    if (posix_memalign(&memory_, kPage, num_bytes) != 0) throw std::bad_alloc();
    char* next = static_cast<char*>(memory_);
    for (iovec& record : records_) {
      record.iov_base = next;
      next += record.iov_len;
    }
  }
  ~AlignedCopy() { std::free(memory_); }
  AlignedCopy(const AlignedCopy&) = delete;
  AlignedCopy& operator=(const AlignedCopy&) = delete;

  const Records& records() const { return records_; }

 private:
  void* memory_ = nullptr;
  Records records_;
};

void copy(const Records& from, const Records& to) {
  for (std::size_t i = 0; i < from.size(); ++i) {
    std::memcpy(to[i].iov_base, from[i].iov_base, from[i].iov_len);
  }
}

void run(Move& move) {
  // Before the write: bytes that change under it are noticed when they are loaded.
  if (move.is_write) make_checksums(move, move.records);
  if (!move.is_direct || std::all_of(move.records.begin(), move.records.end(), is_aligned)) {
    transfer(move, move.records);
  } else {
    const AlignedCopy aligned(move.records);
    if (move.is_write) copy(move.records, aligned.records());
    transfer(move, aligned.records());
    if (!move.is_write && move.error == 0) copy(aligned.records(), move.records);
  }
  if (!move.is_write && move.error == 0) make_checksums(move, move.records);
}

}  // namespace

struct BlockIO::State {
  std::mutex mutex;
  std::condition_variable queued, done;
  std::deque<std::shared_ptr<Move>> queue;
  std::vector<std::thread> threads;
  bool is_closing = false;

  void finish(Move& move) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      move.is_done.store(true, std::memory_order_release);
    }
    done.notify_all();
  }
};

BlockIO::BlockIO(int num_threads)
    : num_threads_(num_threads), pid_(getpid()), state_(std::make_unique<State>()) {}

BlockIO::~BlockIO() {
  if (getpid() == pid_) {
    close();
  } else {
    state_.release();  // its threads and its locks stayed in the parent: there is no way to end it
  }
}

void BlockIO::start() {
  if (!state_->threads.empty()) return;
  // The threads inherit the mask: signals are for the threads of the interpreter.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    for (int i = 0; i < num_threads_; ++i) state_->threads.emplace_back(work, state_.get());
  } catch (const std::system_error&) {  // the process may have no more threads: fewer do as well
    if (state_->threads.empty()) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void BlockIO::submit(std::shared_ptr<Move> move) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->queue.push_back(std::move(move));
  }
  state_->queued.notify_one();
}

void BlockIO::cancel(Move& move) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (move.is_taken) return;
    move.is_taken = true;
    move.error = kCancelled;
  }
  state_->finish(move);
}

bool BlockIO::wait(const Move& move, std::chrono::duration<double> timeout) {
  const auto is_done = [&] { return move.is_done.load(std::memory_order_acquire); };
  if (is_done()) return true;
  std::unique_lock<std::mutex> lock(state_->mutex);
  return state_->done.wait_for(lock, timeout, is_done);
}

void BlockIO::close() {
  std::vector<std::thread> threads;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->is_closing = true;
    threads.swap(state_->threads);
  }
  state_->queued.notify_all();
  for (std::thread& thread : threads) thread.join();
}

void BlockIO::work(State* state) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "tiered-cache-io");  // 15 characters at most
#endif
  while (true) {
    std::shared_ptr<Move> move;
    {
      std::unique_lock<std::mutex> lock(state->mutex);
      state->queued.wait(lock, [&] { return state->is_closing || !state->queue.empty(); });
      if (state->queue.empty()) return;
      move = std::move(state->queue.front());
      state->queue.pop_front();
      if (move->is_taken) continue;  // cancelled
      move->is_taken = true;
      if (state->is_closing) move->error = kCancelled;
      // Those were taken from the queue before this one, so other threads are at them.
      for (const std::shared_ptr<Move>& other : move->after) {
        state->done.wait(lock, [&] { return other->is_done.load(); });
        if (other->error != 0) move->error = kCancelled;
      }
      move->after.clear();
    }
    move->began = std::chrono::steady_clock::now();
    try {
      if (move->error == 0) run(*move);
    } catch (const std::bad_alloc&) {
      move->error = ENOMEM;
      move->error_offset = move->offset;
    }
    move->ended = std::chrono::steady_clock::now();
    state->finish(*move);
  }
}

}  // namespace hf_tiered_cache
