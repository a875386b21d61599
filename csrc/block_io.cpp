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
#include <exception>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#include "xxh3.h"

namespace hf_tiered_cache {
namespace {

constexpr int64_t kPage = 4096;
constexpr std::size_t kMaxVectors = 1024;  // IOV_MAX

using Records = std::vector<iovec>;

void make_checksums(Move& move, const Records& moved) {
  for (std::size_t i = 0; i < moved.size(); ++i) {
    xxh3_128(moved[i].iov_base, moved[i].iov_len, move.checksums[i].data());
  }
}

void fail(Move& move, int error, int64_t offset) {
  move.error = error;
  move.error_offset = offset;
}

// Repeats the system call until every record of `left` went through: interrupted calls again, short
// ones from where they stopped, under direct I/O from the last page before that.
void transfer(Move& move) {
  Records& left = move.left;
  std::size_t first = 0;
  int64_t offset = move.offset;
  while (first < left.size()) {
    const int count = static_cast<int>(std::min(left.size() - first, kMaxVectors));
    ssize_t num_bytes = move.is_write ? pwritev(move.fd, &left[first], count, offset)
                                      : preadv(move.fd, &left[first], count, offset);
    if (num_bytes < 0 && errno == EINTR) continue;
    if (num_bytes > 0 && move.is_direct) num_bytes -= num_bytes % kPage;
    if (num_bytes <= 0) return fail(move, num_bytes < 0 ? errno : kEndOfFile, offset);
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

// Aligned memory for the records of a move as they are in the file; null base where there is none.
struct Buffer {
  explicit Buffer(const Move& move) {
    std::size_t num_bytes = 0;
    for (const iovec& record : move.records) num_bytes += record_bytes(move, record);
    if (posix_memalign(&memory, kPage, num_bytes) != 0) memory = nullptr;
  }
  ~Buffer() { std::free(memory); }

  static std::size_t record_bytes(const Move& move, const iovec& record) {
    return move.packing.kernels != nullptr ? move.packing.record_bytes : record.iov_len;
  }

  void* memory = nullptr;
};

// What a record in memory is in the file. False where it cannot be packed.
bool encode(const Move& move, const iovec& record, const iovec& to) {
  if (move.packing.kernels == nullptr) {
    std::memcpy(to.iov_base, record.iov_base, record.iov_len);
    return true;
  }
  std::memset(to.iov_base, 0, to.iov_len);  // also what pads it
  return move.packing.kernels->pack(move.packing.shape,
                                    static_cast<const uint8_t*>(record.iov_base),
                                    static_cast<uint8_t*>(to.iov_base));
}

void decode(const Move& move, const iovec& from, const iovec& record) {
  if (move.packing.kernels == nullptr) {
    std::memcpy(record.iov_base, from.iov_base, record.iov_len);
  } else {
    move.packing.kernels->unpack(move.packing.shape, static_cast<const uint8_t*>(from.iov_base),
                                 static_cast<uint8_t*>(record.iov_base));
  }
}

// Through other memory: for records that are packed in the file, or lie where direct I/O does not
// take them.
void transfer_through_buffer(Move& move) {
  const Buffer buffer(move);
  if (buffer.memory == nullptr) return fail(move, ENOMEM, move.offset);
  char* next = static_cast<char*>(buffer.memory);
  for (iovec& moved : move.left) {
    moved.iov_len = Buffer::record_bytes(move, moved);
    moved.iov_base = next;
    next += moved.iov_len;
  }
  if (move.is_write) {
    for (std::size_t i = 0; i < move.records.size(); ++i) {
      if (!encode(move, move.records[i], move.left[i])) return fail(move, kUnpackable, move.offset);
    }
    make_checksums(move, move.left);
    return transfer(move);
  }
  transfer(move);
  if (move.error != 0) return;
  next = static_cast<char*>(buffer.memory);
  for (std::size_t i = 0; i < move.records.size(); ++i) {
    const iovec from = {next, Buffer::record_bytes(move, move.records[i])};
    xxh3_128(from.iov_base, from.iov_len, move.checksums[i].data());
    decode(move, from, move.records[i]);
    next += from.iov_len;
  }
}

void run(Move& move) noexcept {
  const bool is_aligned_enough =
      !move.is_direct || std::all_of(move.records.begin(), move.records.end(), is_aligned);
  if (move.packing.kernels != nullptr || !is_aligned_enough) return transfer_through_buffer(move);
  // Before the write: bytes that change under it are noticed when they are loaded.
  if (move.is_write) make_checksums(move, move.records);
  transfer(move);
  if (!move.is_write && move.error == 0) make_checksums(move, move.records);
}

}  // namespace

// Threads that were started together, and end together.
struct BlockIO::Crew {
  std::vector<std::thread> threads;
  bool is_dismissed = false;
};

struct BlockIO::State {
  std::mutex mutex;
  std::condition_variable queued, done;
  std::deque<std::shared_ptr<Move>> queue;
  std::set<int64_t> users;
  std::unique_ptr<Crew> crew;  // while there are users

  void finish(Move& move) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      move.is_done.store(true, std::memory_order_release);
    }
    done.notify_all();
  }
};

BlockIO::BlockIO(int num_threads)
    : most_threads_(num_threads), pid_(getpid()), state_(std::make_unique<State>()) {}

BlockIO::~BlockIO() {
  if (getpid() == pid_) {
    state_->users.clear();
    dismiss_if_unused();
  } else {
    state_.release();  // its threads and its locks stayed in the parent: there is no way to end it
  }
}

void BlockIO::enter(int64_t user) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->crew == nullptr) {
    auto crew = std::make_unique<Crew>();
    crew->threads.reserve(static_cast<std::size_t>(most_threads_));
    // The threads inherit the mask: signals are for the threads of the interpreter.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::exception_ptr refusal;
    try {
      for (int i = 0; i < most_threads_; ++i) {
        crew->threads.emplace_back(work, state_.get(), crew.get());
      }
    } catch (...) {  // the process may have no more threads: fewer do as well
      refusal = std::current_exception();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (crew->threads.empty()) std::rethrow_exception(refusal);
    state_->crew = std::move(crew);
  }
  state_->users.insert(user);
}

void BlockIO::leave(int64_t user) {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->users.erase(user);
  }
  dismiss_if_unused();
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

int BlockIO::num_threads() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->crew == nullptr ? 0 : static_cast<int>(state_->crew->threads.size());
}

void BlockIO::dismiss_if_unused() {
  std::unique_ptr<Crew> crew;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    if (!state_->users.empty() || state_->crew == nullptr) return;
    crew = std::move(state_->crew);
    crew->is_dismissed = true;
  }
  state_->queued.notify_all();
  for (std::thread& thread : crew->threads) thread.join();
}

void BlockIO::work(State* state, Crew* crew) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "tiered-cache-io");  // 15 characters at most
#endif
  while (true) {
    std::shared_ptr<Move> move;
    {
      std::unique_lock<std::mutex> lock(state->mutex);
      state->queued.wait(lock, [&] { return crew->is_dismissed || !state->queue.empty(); });
      if (crew->is_dismissed) return;
      move = std::move(state->queue.front());
      state->queue.pop_front();
      if (move->is_taken) continue;  // cancelled
      move->is_taken = true;
      // Those were taken from the queue before this one, so other threads are at them.
      for (const std::shared_ptr<Move>& other : move->after) {
        state->done.wait(lock, [&] { return other->is_done.load(); });
        if (other->error != 0) move->error = kCancelled;
      }
      move->after.clear();
    }
    move->began = std::chrono::steady_clock::now();
    if (move->error == 0) run(*move);
    move->ended = std::chrono::steady_clock::now();
    state->finish(*move);
  }
}

}  // namespace hf_tiered_cache
