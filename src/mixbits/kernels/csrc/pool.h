// A small pool of threads for short jobs.
//
// A job is a number of chunks; whoever is awake takes the next one, the caller included, so that a helper that lost its core delays at
// most the chunk it holds. Helpers stay awake for some microseconds after a job (a decode step is a row of short ones), then sleep; so
// does a caller that waits for the last chunks. Where helpers cost more than they save, because other processes use the cores, the caller
// works alone for a while. A function that throws does not stop the job; the caller gets std::bad_alloc after it.
#pragma once
#include <cstdint>
#include <type_traits>

namespace mb {

using ChunkFunction = void (*)(void* context, int64_t chunk);
void run_chunks(ChunkFunction function, void* context, int64_t num_chunks);
int num_threads();
void set_num_threads(int count);

template <class F> void parallel_for(int64_t num_chunks, F&& f) {
  run_chunks([](void* context, int64_t chunk) { (*static_cast<std::remove_reference_t<F>*>(context))(chunk); }, &f, num_chunks);
}

}  // namespace mb
