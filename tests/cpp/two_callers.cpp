// Two threads call parallel_for at once. The second begins alone and must be given the workers once
// the first has ended: two of its items, which wait for one another, can only then both go on.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "thread_pool.h"

using hf_tiered_cache::parallel_for;

namespace {

std::atomic<int> num_of_first{0}, num_met{0};
std::atomic<bool> second_has_begun{false}, first_has_ended{false}, is_late{false};

template <class Done>
void wait(const Done& done) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (!done() && !is_late) {
    if (std::chrono::steady_clock::now() > deadline) is_late = true;
    std::this_thread::yield();
  }
}

void first(void*, int64_t) {
  ++num_of_first;
  wait([] { return second_has_begun.load(); });
}

void second(void*, int64_t item) {
  if (item == 0) {  // alone, while the first call has the workers
    second_has_begun = true;
    wait([] { return first_has_ended.load(); });
    return;
  }
  ++num_met;
  wait([] { return num_met.load() >= 2; });
}

}  // namespace

int main() {
  std::thread one([] {
    parallel_for(2, 2, first, nullptr);
    first_has_ended = true;
  });
  wait([] { return num_of_first.load() > 0; });
  parallel_for(2, 3, second, nullptr);
  one.join();
  std::puts(is_late ? "the second call was left alone" : "both had the workers");
  return is_late;
}
