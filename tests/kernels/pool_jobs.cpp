// Jobs of the thread pool: short and long ones, more or fewer threads in between, chunks that throw, a second caller at the same time. Every
// chunk runs once. Built by test_sanitizers.py. Usage: pool_jobs NUM_JOBS
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

uint32_t state = 1;
uint32_t next(uint32_t below) { return (state = state * 1664525u + 1013904223u) / 256 % below; }

void work(std::chrono::microseconds time) {
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < time) {}
}

void need(bool good, const char* what, int job) {
  if (good) return;
  std::printf("job %d: %s\n", job, what);
  std::exit(1);
}

void two_callers(int job) {
  std::atomic<int> here{0}, there{0};
  std::thread other([&] { mb::parallel_for(50, [&](int64_t) { work(std::chrono::microseconds(2)), ++there; }); });
  mb::parallel_for(50, [&](int64_t) { work(std::chrono::microseconds(2)), ++here; });
  other.join();
  need(here == 50 && there == 50, "chunks of two callers are lost", job);
}

}  // namespace

int main(int, char** arguments) {
  const int jobs = std::atoi(arguments[1]);
  for (int job = 0; job < jobs; ++job) {
    if (job % 500 == 0) mb::set_num_threads(1 + static_cast<int>(next(4)));
    const int64_t chunks = 1 + next(20);
    const std::chrono::microseconds time(next(100) ? next(6) : 400);
    const bool throws = job % 97 == 5;
    std::vector<int> runs(static_cast<size_t>(chunks), 0);
    bool thrown = false;
    try {
      mb::parallel_for(chunks, [&](int64_t i) {
        work(time);
        ++runs[static_cast<size_t>(i)];
        if (throws && i == chunks / 2) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    need(thrown == throws, "an exception is lost or invented", job);
    for (int count : runs) need(count == 1 || (throws && count == 0), "a chunk did not run once", job);
    if (next(50) == 0) std::this_thread::sleep_for(std::chrono::microseconds(next(300)));  // helpers fall asleep
    if (job % 1000 == 999) two_callers(job);
  }
  std::printf("%d jobs\n", jobs);
}
