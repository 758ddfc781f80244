#include "pool.h"

#include <algorithm>
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
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mb {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// A helper waits for the next job awake for kSpin; half as long, down to kLeastSpin, each time that none came meanwhile.
constexpr Clock::duration kSpin = microseconds(40), kLeastSpin = microseconds(8);
constexpr Clock::duration kWait = microseconds(40);        // the caller waits awake for the last chunks, then sleeps
constexpr Clock::duration kWaking = microseconds(5);       // what a job costs because it has helpers
constexpr Clock::duration kMostCredit = microseconds(200), kLeastCredit = microseconds(-100);
constexpr Clock::duration kLongestPause = milliseconds(200);
constexpr int kFirstPause = 8, kLastPause = 256;           // a pause without helpers, in times that were lost with them
constexpr Clock::duration kAlone = microseconds(100);      // a job alone for so long is shared after all
constexpr auto kPolite = milliseconds(1);
constexpr int64_t kMaxChunks = (1 << 20) - 1;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The core this thread runs on, -1 if the system does not say.
inline int core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// A ticket packs the job's number, its chunks and the next chunk, so that one compare-and-swap takes a chunk of a job that is still
// the current one. While a taken chunk is not done the job cannot end, so its function and context stay valid.
struct Pool {
  std::atomic<uint64_t> ticket{0};  // job number (24 bits) | chunks (20) | next (20)
  std::atomic<int64_t> done{0};
  std::atomic<int> sleeping{0};
  std::atomic<int> caller_core{-1};
  std::atomic<bool> stop{false}, failed{false}, waiting{false};
  ChunkFunction function = nullptr;
  void* context = nullptr;
  uint64_t number = 0;
  std::mutex mutex;
  std::condition_variable wake, finished;
  std::vector<std::thread> helpers;
  // The caller's: time that helpers have saved of late, and until when to do without them.
  Clock::duration credit{};
  Clock::time_point resume{};
  int pause = kFirstPause;

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
        if (done.fetch_add(1) + 1 == static_cast<int64_t>(chunks) && waiting.load()) {
          { std::lock_guard<std::mutex> lock(mutex); }
          finished.notify_one();
        }
        return true;
      }
    }
  }

  bool is_open() const {
    const uint64_t t = ticket.load();
    return (t & 0xfffff) < (t >> 20 & 0xfffff);
  }
  uint64_t job() const { return ticket.load() >> 40; }

  void help() {
    constexpr uint64_t kNone = ~uint64_t{0};
    Clock::duration spin = kSpin;
    uint64_t left_alone = kNone;
    while (!stop.load()) {
      const auto since = Clock::now();
      bool came = is_open();
      for (int turns = 0; !came && !stop.load(std::memory_order_relaxed);) {
        relax();
        came = is_open();
        if (came) spin = kSpin;
        else if (++turns % 16 == 0 && Clock::now() - since >= spin) break;
      }
      if (came) {
        // Where the caller runs on this very core, working here only keeps it from working; a long job may have been moved meanwhile.
        const uint64_t number = job();
        if (number == left_alone || core() < 0 || core() != caller_core.load(std::memory_order_relaxed)) {
          while (take()) {}
          continue;
        }
        left_alone = number;
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait_for(lock, kPolite, [&] { return stop.load() || (is_open() && job() != number); });
        sleeping.fetch_sub(1);
        continue;
      }
      spin = std::max(spin / 2, kLeastSpin);
      std::unique_lock<std::mutex> lock(mutex);
      sleeping.fetch_add(1);
      wake.wait(lock, [&] { return stop.load() || is_open(); });
      sleeping.fetch_sub(1);
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

  // All chunks from `first` on. Whether helpers are worth it is measured: what they do is time saved, waiting for them is time lost.
  void share(ChunkFunction f, void* c, int64_t first, int64_t chunks) {
    const auto begin = Clock::now();
    function = f;
    context = c;
    done.store(first, std::memory_order_relaxed);
    failed.store(false, std::memory_order_relaxed);
    caller_core.store(core(), std::memory_order_relaxed);
    ticket.store(pack(++number, static_cast<uint64_t>(chunks), static_cast<uint64_t>(first)));
    if (sleeping.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    int64_t own = 0;
    while (take()) ++own;
    const auto end = Clock::now();
    auto now = end;
    for (int turns = 0; done.load() < chunks && now - end < kWait;) {
      relax();
      if (++turns % 16 == 0) now = Clock::now();
    }
    if (done.load() < chunks) {
      std::unique_lock<std::mutex> lock(mutex);
      waiting.store(true);
      finished.wait(lock, [&] { return done.load() >= chunks; });
      waiting.store(false);
    }
    const auto saved = own ? (end - begin) / own * (chunks - first - own) : Clock::duration{};
    credit = std::min(credit + saved - (Clock::now() - end) - kWaking, kMostCredit);
    if (credit == kMostCredit) pause = kFirstPause;
    if (credit < kLeastCredit) {
      resume = Clock::now() + std::min<Clock::duration>(-credit * pause, kLongestPause);
      pause = std::min(2 * pause, kLastPause);
      credit = Clock::duration{};
    }
    if (failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

  void run(ChunkFunction f, void* c, int64_t chunks) {
    int64_t first = 0;
    for (const auto begin = Clock::now(); first < chunks; f(c, first++)) {
      const auto now = Clock::now();
      if (now >= resume || now - begin > kAlone) break;
    }
    if (first < chunks) share(f, c, first, chunks);
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
