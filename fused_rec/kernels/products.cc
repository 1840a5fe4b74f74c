// Products of matrices rounded to bfloat16, with float32 sums, by tile registers, for XLA on CPUs;
// fused_rec/model/precision.py calls them. Float32 factors are rounded on the way: nothing is copied.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parts.h"
#include "tiles.h"

#ifdef FUSED_REC_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

// Whether the processor has tile registers and the system lets this process use them.
extern "C" int fused_rec_has_tiles() {
#ifdef FUSED_REC_TILES
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const bool there = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return there && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return 0;
#endif
}

#ifdef FUSED_REC_TILES

namespace {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

using namespace fused_rec;

constexpr int64_t kRows = 256;        // summed over at a time, so that their tiles and the sums stay in the cache
constexpr int64_t kPartRows = 1024;   // of a part, at least
constexpr int64_t kSums = 1 << 24;    // floats of the sums of all parts, at most

// Rows first to last of a b; right: the right tiles of b, those of 32 of its rows one after the other.
template <typename A>
void multiply_rows(Matrix<A> a, const char* right, int64_t columns, int64_t first, int64_t last, float* out) {
  TileRegisters registers;
  const int64_t depth = padded(a.columns), width = padded(columns), steps = depth / kDepth;
  auto left = scratch<char>(2 * kDepth * depth);
  alignas(64) float block[kDepth * kDepth];
  for (int64_t row = first; row < last; row += kDepth) {
    left_tiles(a, row, left.get(), kBytes);
    left_tiles(a, row + kTile, left.get() + steps * kBytes, kBytes);
    const int64_t rows = std::min(kDepth, last - row);
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t there = std::min(kDepth, columns - k);
      const bool whole = rows == kDepth && there == kDepth;
      float* const to = out + row * columns + k;
      multiply({left.get(), 64, kBytes, steps * kBytes}, {right + k / kTile * kBytes, 64, width / kTile * kBytes, kBytes},
               steps, whole ? to : block, whole ? columns : kDepth, false);
      for (int64_t i = 0; !whole && i < rows; ++i) {
        std::memcpy(to + i * columns, block + i * kDepth, there * sizeof(float));
      }
    }
  }
}

template <typename B>
void pack_right(Matrix<B> b, char* tiles) {
  for (int64_t row = 0; row < b.rows; row += kDepth) {
    right_tiles(b, row, tiles + row * padded(b.columns) * 2, kBytes);
  }
}

// The share of the rows first to last in the product of a's transpose and b, padded.
template <typename A, typename B>
void multiply_over(Matrix<A> a, Matrix<B> b, int64_t first, int64_t last, float* sums) {
  TileRegisters registers;
  const int64_t height = padded(a.columns), width = padded(b.columns), along = kRows / kDepth;
  auto left = scratch<char>(2 * kRows * height), right = scratch<char>(2 * kRows * width);
  std::fill(sums, sums + height * width, 0.0f);
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t steps = std::min(along, (last - row + kDepth - 1) / kDepth);
    for (int64_t step = 0; step < steps; ++step) {
      right_tiles(a, row + step * kDepth, left.get() + step * kBytes, along * kBytes);
      for (int64_t tile = 0; tile < height / kTile; ++tile) transpose_tile(left.get() + (tile * along + step) * kBytes);
      right_tiles(b, row + step * kDepth, right.get() + step * kDepth * width * 2, kBytes);
    }
    for (int64_t m = 0; m < height; m += kDepth) {
      for (int64_t k = 0; k < width; k += kDepth) {
        multiply({left.get() + m / kTile * along * kBytes, 64, kBytes, along * kBytes},
                 {right.get() + k / kTile * kBytes, 64, width / kTile * kBytes, kBytes}, steps, sums + m * width + k,
                 width, true);
      }
    }
  }
}

#pragma GCC pop_options

template <typename A, typename B>
void product(ffi::ThreadPool pool, Matrix<A> a, Matrix<B> b, float* out) {
  auto tiles = scratch<char>(2 * padded(b.rows) * padded(b.columns));
  pack_right(b, tiles.get());
  const int64_t blocks = (a.rows + kDepth - 1) / kDepth, parts = std::min<int64_t>(blocks, 64);
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), a.rows / kDepth));
  const char* const right = tiles.get();
  on_large_pages(out, a.rows * b.columns * sizeof(float));
  in_parts(pool, threads, parts, [=](int64_t p) {
    const int64_t first = blocks * p / parts * kDepth, last = blocks * (p + 1) / parts * kDepth;
    multiply_rows(a, right, b.columns, first, std::min(last, a.rows), out);
  });
}

// Parts are of the same rows for any number of threads and are added in order, so the result is the same for any.
template <typename A, typename B>
void product_over_rows(ffi::ThreadPool pool, Matrix<A> a, Matrix<B> b, float* out) {
  const int64_t width = padded(b.columns), size = padded(a.columns) * width, blocks = (a.rows + kRows - 1) / kRows;
  const int64_t wanted = (a.rows + kPartRows - 1) / kPartRows;
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, kSums / size, int64_t{32}}));
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), parts));
  auto sums = scratch<float>(parts * size);
  float* const all = sums.get();
  in_parts(pool, threads, parts, [=](int64_t p) {
    const int64_t first = blocks * p / parts * kRows, last = blocks * (p + 1) / parts * kRows;
    multiply_over(a, b, first, std::min(last, a.rows), all + p * size);
  });
  for (int64_t m = 0; m < a.columns; ++m) {
    float* const to = out + m * b.columns;
    std::memcpy(to, all + m * width, b.columns * sizeof(float));
    for (int64_t p = 1; p < parts; ++p) {
      for (int64_t k = 0; k < b.columns; ++k) to[k] += all[p * size + m * width + k];
    }
  }
}

// call(a, b) with the types of these matrices.
template <typename Call>
ffi::Error with_types(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b, Call call) {
  const auto of = [](const ffi::AnyBuffer& x, auto numbers) {
    return Matrix<std::remove_const_t<std::remove_pointer_t<decltype(numbers)>>>{numbers, x.dimensions()[0],
                                                                               x.dimensions()[1]};
  };
  const auto with = [&](auto left) {
    const void* const right = b.untyped_data();
    if (b.element_type() == ffi::F32) return call(left, of(b, static_cast<const float*>(right))), true;
    if (b.element_type() == ffi::BF16) return call(left, of(b, static_cast<const uint16_t*>(right))), true;
    return false;
  };
  const void* const left = a.untyped_data();
  const bool known = a.element_type() == ffi::F32    ? with(of(a, static_cast<const float*>(left)))
                     : a.element_type() == ffi::BF16 ? with(of(a, static_cast<const uint16_t*>(left)))
                                                     : false;
  return known ? ffi::Error::Success() : ffi::Error::InvalidArgument("factors must be float32 or bfloat16");
}

}  // namespace

#endif  // FUSED_REC_TILES

namespace {

// over_rows: whether a's transpose is meant.
ffi::Error tile_product(ffi::ThreadPool pool, ffi::AnyBuffer a, ffi::AnyBuffer b, bool over_rows,
                        ffi::ResultBuffer<ffi::F32> out) {
#ifdef FUSED_REC_TILES
  const auto of_a = a.dimensions(), of_b = b.dimensions(), shape = out->dimensions();
  if (of_a.size() != 2 || of_b.size() != 2 || shape.size() != 2 || of_a[over_rows ? 0 : 1] != of_b[0] ||
      shape[0] != of_a[over_rows ? 1 : 0] || shape[1] != of_b[1]) {
    return ffi::Error::InvalidArgument("factors and product must be matrices of fitting shapes");
  }
  float* const to = out->typed_data();
  if (out->element_count() == 0) return ffi::Error::Success();
  return with_types(a, b, [=](auto left, auto right) {
    if (over_rows) product_over_rows(pool, left, right, to);
    else product(pool, left, right, to);
  });
#else
  return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_tile_product, tile_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("over_rows")
                                  .Ret<ffi::Buffer<ffi::F32>>());
