// What every kernel here shares: work cut into parts for the threads of XLA's pool, one compilation for each generation
// of processors, large pages.

#ifndef FUSED_REC_KERNELS_PARTS_H_
#define FUSED_REC_KERNELS_PARTS_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "lanes.h"
#include "xla/ffi/api/ffi.h"

// The loader picks the compilation that fits.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace fused_rec {

constexpr int kLooks = 2000;  // at whether the others are done, some tens of microseconds, before a caller sleeps

// Lets the other thread of the core go on, where the processor has an instruction for it.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The parts of one call. Threads of the pool take them one by one, and so does the caller, who therefore waits only for
// parts that somebody is at work on: a pool that is busy elsewhere delays nothing.
struct Parts {
  std::atomic<int64_t> taken{0}, done{0};
  std::mutex mutex;
  std::condition_variable all_done;
};

// part(p) for every p below count, by up to `threads` threads.
template <typename Part>
void in_parts(xla::ffi::ThreadPool pool, int64_t threads, int64_t count, Part part) {
  auto parts = std::make_shared<Parts>();
  auto take = [=] {
    for (int64_t p; (p = parts->taken.fetch_add(1)) < count;) {
      part(p);
      if (parts->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(parts->mutex);
        parts->all_done.notify_one();
      }
    }
  };
  for (int64_t helper = 1; helper < threads; ++helper) pool.Schedule(std::function<void()>(take));
  take();
  // To sleep and be woken takes longer than the last part of a small call.
  for (int look = 0; look < kLooks && threads > 1; ++look) {
    if (parts->done.load() == count) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(parts->mutex);
  parts->all_done.wait(lock, [&] { return parts->done.load() == count; });
}

// A buffer of so many numbers, in float32 or in one or three parts of bfloat16; nothing for any other.
inline std::optional<Rows> as_rows(xla::ffi::AnyBuffer& x, int64_t count) {
  const int64_t all = x.element_count(), parts = count ? all / count : 1;
  if (parts * count != all) return std::nullopt;
  if (x.element_type() == xla::ffi::F32 && parts == 1) return Rows{static_cast<float*>(x.untyped_data()), nullptr, 1, count};
  if (x.element_type() != xla::ffi::BF16 || (parts != 1 && parts != 3)) return std::nullopt;
  return Rows{nullptr, static_cast<uint16_t*>(x.untyped_data()), parts, count};
}

// Asks for large pages, where the system gives them on request: rows that lie anywhere are then found sooner, and the
// system is asked for memory less often.
inline void on_large_pages(void* begin, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it works without, too
#endif
}

}  // namespace fused_rec

#endif  // FUSED_REC_KERNELS_PARTS_H_
