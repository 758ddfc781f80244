#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
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
  std::atomic<bool> stop{false};
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
        function(context, static_cast<int64_t>(next));
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
    } catch (const std::system_error&) {
    }  // fewer threads than asked for: the caller does the rest
  }

  void run(ChunkFunction f, void* c, int64_t chunks) {
    function = f;
    context = c;
    done.store(0, std::memory_order_relaxed);
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
  }
};

std::mutex owner;  // one job at a time; a second caller works alone
Pool* pool = nullptr;
int wanted = 1;
int started = 1;

// After fork() the helpers do not exist in the child: it starts with a fresh pool (the old one cannot be taken apart).
void forget_pool() {
  pool = nullptr;
  started = 1;
  new (&owner) std::mutex;
}

}  // namespace

int num_threads() { return wanted; }

void set_num_threads(int count) {
  std::lock_guard<std::mutex> lock(owner);
  wanted = count < 1 ? 1 : count;
}

void run_chunks(ChunkFunction function, void* context, int64_t num_chunks) {
  std::unique_lock<std::mutex> lock(owner, std::try_to_lock);
  if (num_chunks < 2 || num_chunks > kMaxChunks || !lock.owns_lock() || wanted < 2) {
    for (int64_t i = 0; i < num_chunks; ++i) function(context, i);
    return;
  }
  if (!pool) {
#if !defined(_WIN32)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    pool = new Pool;  // lives until the process ends: helpers may be asleep in it
  }
  if (started != wanted) {
    pool->resize(wanted);
    started = wanted;
  }
  pool->run(function, context, num_chunks);
}

}  // namespace mb
