#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mb {
namespace {

constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int64_t kMaxChunks = (1 << 20) - 1;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A ticket packs the job's number, its chunks and the next chunk, so that one compare-and-swap takes a chunk of a job that is still
// the current one. While a taken chunk is not done the job cannot end, so its function and context stay valid.
struct Pool {
  std::atomic<uint64_t> ticket{0};  // job number (24 bits) | chunks (20) | next (20)
  std::atomic<int64_t> done{0};
  std::atomic<int> sleeping{0};
  std::atomic<bool> stop{false}, failed{false};
  ChunkFunction function = nullptr;
  void* context = nullptr;
  uint64_t number = 0;
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> helpers;

  static uint64_t pack(uint64_t number, uint64_t chunks, uint64_t next) { return (number & 0xffffff) << 40 | chunks << 20 | next; }

  // Take and run one chunk; false if there is none.
  bool take() {
    uint64_t t = ticket.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t next = t & 0xfffff, chunks = t >> 20 & 0xfffff;
      if (next >= chunks) return false;
      if (ticket.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        try {
          function(context, static_cast<int64_t>(next));
        } catch (...) {  // out of memory: the others finish their chunks, then the caller is told
          failed.store(true, std::memory_order_relaxed);
        }
        done.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void help() {
    auto idle_since = std::chrono::steady_clock::now();
    int turns = 0;
    while (!stop.load(std::memory_order_relaxed)) {
      if (take()) {
        while (take()) {}
        idle_since = std::chrono::steady_clock::now();
        continue;
      }
      relax();
      if (++turns % 64 || std::chrono::steady_clock::now() - idle_since < kSpin) continue;
      std::unique_lock<std::mutex> lock(mutex);
      sleeping.fetch_add(1);
      wake.wait(lock, [&] {
        const uint64_t t = ticket.load();
        return stop.load() || (t & 0xfffff) < (t >> 20 & 0xfffff);
      });
      sleeping.fetch_sub(1);
      idle_since = std::chrono::steady_clock::now();
    }
  }

  void resize(int count) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& helper : helpers) helper.join();
    helpers.clear();
    stop = false;
    try {
      for (int i = 1; i < count; ++i) helpers.emplace_back([this] { help(); });
    } catch (const std::exception&) {
    }  // fewer threads than asked for: the caller does the rest
  }

  void run(ChunkFunction f, void* c, int64_t chunks) {
    function = f;
    context = c;
    done.store(0, std::memory_order_relaxed);
    failed.store(false, std::memory_order_relaxed);
    ticket.store(pack(++number, static_cast<uint64_t>(chunks), 0));
    if (sleeping.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    while (take()) {}
    for (int turns = 0; done.load(std::memory_order_acquire) < chunks;) {
      relax();
#if !defined(_WIN32)
      if (++turns > 4000) sched_yield();  // the chunk's owner may be waiting for this core
#else
      ++turns;
#endif
    }
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }
};

std::mutex owner;  // one job at a time; a second caller works alone
Pool* pool = nullptr;
std::atomic<int> wanted{1};
int started = 1;

#if !defined(_WIN32)
// After fork() the helpers do not exist in the child: it starts with a fresh pool (the old one cannot be taken apart).
void forget_pool() {
  pool = nullptr;
  started = 1;
  new (&owner) std::mutex;
}
const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

// The pool with `count` threads, or null if there is no memory for one. The caller holds `owner`.
Pool* pool_of(int count) {
  if (!pool) pool = new (std::nothrow) Pool;  // lives until the process ends: helpers may be asleep in it
  if (pool && started != count) {
    pool->resize(count);
    started = count;
  }
  return pool;
}

}  // namespace

int num_threads() { return wanted.load(std::memory_order_relaxed); }

void set_num_threads(int count) { wanted.store(count < 1 ? 1 : count, std::memory_order_relaxed); }

void run_chunks(ChunkFunction function, void* context, int64_t num_chunks) {
  const int count = num_threads();
  if (count > 1 && num_chunks > 1 && num_chunks <= kMaxChunks) {
    std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
    Pool* const helped = lock.owns_lock() ? pool_of(count) : nullptr;
    if (helped) return helped->run(function, context, num_chunks);
  }
  for (int64_t i = 0; i < num_chunks; ++i) function(context, i);
}

}  // namespace mb
