// Linear layers of packed texts by tile registers (AMX), for XLA on CPUs; fused_rec/text/encoders/packed_decoder.py calls them.
//
// Factors are bfloat16, or float32 as sums of bfloat16: a number is the sum of three, the nearest one and those of what
// is left, and of the nine products of parts the six largest are summed, the others being below the rounding of float32
// (Henry, Tang and Heinecke, 2019, arXiv 1904.06376). Kernels of all layers are given with the number of a layer, since
// XLA would copy the layer.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "lanes.h"
#include "parts.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace {

using Bias = ffi::Buffer<ffi::F32>;  // empty for none

#ifdef FUSED_REC_TILES

using fused_rec::at;
using fused_rec::kBytes;
using fused_rec::kDepth;
using fused_rec::kLanes;
using fused_rec::kTile;
using fused_rec::Lanes;
using fused_rec::Matrix;
using fused_rec::Rows;

constexpr int64_t kCache = 1 << 20;  // bytes of the rows of a part, which are read again for each 32 columns

// The right tiles of a kernel: of each part, those of 16 columns one after the other.
struct Kernel {
  fused_rec::Storage tiles;
  int64_t depth, columns, parts;

  const char* strip(int64_t part, int64_t column) const {
    return tiles.get() + (part * columns + column) * depth * 2;
  }
};

struct Left {
  const uint16_t* x;  // parts one after the other
  int64_t rows, depth, parts;
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16,prefer-vector-width=512")

// The tiles of rows step * 32 on, in parts; returns the number of parts that are not 0.
int64_t pack_step(Matrix<float> kernel, int64_t step, int64_t parts, char* tiles) {
  const int64_t along = kernel.rows / kDepth * kBytes, plane = kernel.rows * kernel.columns * 2;
  __m512i second = _mm512_setzero_si512(), third = second;
  tiles += step * kBytes;
  for (int64_t p = 0; p < kTile; ++p, tiles += 64) {
    const float* const one = kernel.at(step * kDepth + 2 * p, 0);
    char* to = tiles;
    for (int64_t column = 0; column < kernel.columns; column += kTile, to += along) {
      __m512 low = _mm512_loadu_ps(one + column), high = _mm512_loadu_ps(one + kernel.columns + column);
      _mm512_store_si512(to, fused_rec::interleaved(fused_rec::next_part(low, high)));
      if (parts == 1) continue;
      const __m512i next = fused_rec::next_part(low, high), last = fused_rec::next_part(low, high);
      _mm512_store_si512(to + plane, fused_rec::interleaved(next));
      _mm512_store_si512(to + 2 * plane, fused_rec::interleaved(last));
      second = _mm512_or_si512(second, next), third = _mm512_or_si512(third, last);
    }
  }
  return _mm512_test_epi32_mask(third, third) ? 3 : _mm512_test_epi32_mask(second, second) ? 2 : 1;
}

int64_t pack_step(Matrix<uint16_t> kernel, int64_t step, int64_t parts, char* tiles) {
  fused_rec::right_tiles(kernel, step * kDepth, tiles + step * kBytes, kernel.rows / kDepth * kBytes);
  return 1;
}

// 32 x 32 numbers of the product: rows of x from `row`, columns of the kernel from `column`.
INLINE void multiply(const Left& left, const Kernel& kernel, int64_t row, int64_t column, float* sums, int64_t line) {
  // The smallest products first.
  constexpr int8_t kPairs[6][2] = {{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}};
  const int64_t stride = left.depth * 2, steps = left.depth / kDepth;
  fused_rec::clear_sums();
  for (const auto& [x, k] : kPairs) {
    if (x >= left.parts || k >= kernel.parts) continue;
    const uint16_t* const begin = left.x + (x * left.rows + row) * left.depth;
    fused_rec::accumulate({begin, stride, 64, kTile * stride},
                          {kernel.strip(k, column), 64, kBytes, left.depth * 2 * kTile}, steps);
  }
  fused_rec::store_sums(sums, line);
}

void dense_rows(const Left& left, const Kernel& kernel, const float* bias, int64_t first, int64_t last, float* out) {
  const fused_rec::TileRegisters registers;
  for (int64_t column = 0; column < kernel.columns; column += kDepth) {
    for (int64_t row = first; row < last; row += kDepth) {
      float* const to = out + row * kernel.columns + column;
      multiply(left, kernel, row, column, to, kernel.columns);
      for (int64_t i = 0; bias && i < kDepth; ++i) {
        float* const sums = to + i * kernel.columns;
        at(sums) += at(bias + column);
        at(sums + kLanes) += at(bias + column + kLanes);
      }
    }
  }
}

// silu(x gate + bias) * (x up + bias).
struct Gated {
  const Kernel &gate, &up;
  const float *gate_bias, *up_bias;
  Rows out;
};

INLINE Lanes with_bias(const float* x, const float* bias, int64_t column) {
  return bias ? at(x) + at(bias + column) : at(x);
}

void gated_rows(const Left& left, const Gated& g, int64_t first, int64_t last) {
  const fused_rec::TileRegisters registers;
  alignas(64) float gate[kDepth * kDepth], up[kDepth * kDepth];
  for (int64_t column = 0; column < g.gate.columns; column += kDepth) {
    for (int64_t row = first; row < last; row += kDepth) {
      multiply(left, g.gate, row, column, gate, kDepth);
      multiply(left, g.up, row, column, up, kDepth);
      for (int64_t i = 0; i < kDepth; ++i) {
        for (int64_t c = 0; c < kDepth; c += kLanes) {
          const Lanes open = fused_rec::silu(with_bias(gate + i * kDepth + c, g.gate_bias, column + c));
          const Lanes y = open * with_bias(up + i * kDepth + c, g.up_bias, column + c);
          g.out.store(y, (row + i) * g.gate.columns + column + c);
        }
      }
    }
  }
}

#pragma GCC pop_options

// part(first, last) for consecutive rows, multiples of 32, whose numbers fit into the cache.
template <typename Part>
void rows_in_parts(ffi::ThreadPool pool, const Left& left, Part part) {
  const int64_t blocks = left.rows / kDepth;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), blocks));
  const int64_t fitting = std::max<int64_t>(1, kCache / (2 * left.parts * left.depth * kDepth));
  const int64_t count = std::max((blocks + fitting - 1) / fitting, threads);
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) {
    part(blocks * p / count * kDepth, blocks * (p + 1) / count * kDepth);
  });
}

template <typename T>
Kernel packed(ffi::ThreadPool pool, const T* kernel, int64_t depth, int64_t columns, int64_t parts) {
  parts = sizeof(T) == 2 ? 1 : parts;
  Kernel made{fused_rec::scratch<char>(2 * parts * depth * columns), depth, columns, 1};
  char* const tiles = made.tiles.get();
  const Matrix<T> matrix{kernel, depth, columns};
  auto most = std::make_shared<std::atomic<int64_t>>(1);
  const int64_t steps = depth / kDepth, threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), steps));
  fused_rec::in_parts(pool, threads, steps, [=](int64_t step) {
    const int64_t found = pack_step(matrix, step, parts, tiles);
    for (int64_t old = most->load(); old < found && !most->compare_exchange_weak(old, found);) continue;
  });
  made.parts = most->load();
  return made;
}

// The kernel of a layer, of [layers, depth, columns] in float32, bfloat16 or its bits.
Kernel packed(ffi::ThreadPool pool, const ffi::AnyBuffer& kernels, int64_t layer, int64_t parts) {
  const int64_t depth = kernels.dimensions()[1], columns = kernels.dimensions()[2], place = layer * depth * columns;
  if (kernels.element_type() == ffi::F32) {
    return packed(pool, static_cast<const float*>(kernels.untyped_data()) + place, depth, columns, parts);
  }
  return packed(pool, static_cast<const uint16_t*>(kernels.untyped_data()) + place, depth, columns, parts);
}

// Says what does not fit; null if all does.
const char* problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, const Bias& bias, int64_t layer) {
  const auto of = x.dimensions(), by = kernel.dimensions();
  const auto type = kernel.element_type();
  if (of.size() != 3 || by.size() != 3 || of[2] != by[1] || of[1] % kDepth || by[1] % kDepth || by[2] % kDepth ||
      x.element_type() != ffi::BF16 || (of[0] != 1 && of[0] != 3)) {
    return "x must be one or three parts of bfloat16, with rows and columns, as those of the kernel, multiples of 32";
  }
  if (type != ffi::F32 && type != ffi::BF16 && type != ffi::U16) return "kernels must be float32, bfloat16 or its bits";
  if (layer < 0 || layer >= by[0]) return "there is no such layer";
  const int64_t biases = bias.element_count();
  return biases && biases != by[2] ? "the bias must have a number for each column" : nullptr;
}

const float* numbers_of(const Bias& x) { return x.element_count() ? x.typed_data() : nullptr; }

Left left_of(const ffi::AnyBuffer& x) {
  const auto shape = x.dimensions();
  return {static_cast<const uint16_t*>(x.untyped_data()), shape[1], shape[2], shape[0]};
}

#endif  // FUSED_REC_TILES

ffi::Error dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, Bias bias, ffi::Buffer<ffi::S32> layer,
                 ffi::ResultBuffer<ffi::F32> out) {
#ifdef FUSED_REC_TILES
  const int64_t at_layer = *layer.typed_data();
  if (const char* const wrong = problem(x, kernel, bias, at_layer)) return ffi::Error::InvalidArgument(wrong);
  const Left left = left_of(x);
  const Kernel tiles = packed(pool, kernel, at_layer, left.parts);
  if (static_cast<int64_t>(out->element_count()) != left.rows * tiles.columns) {
    return ffi::Error::InvalidArgument("the result must have a row for each of x");
  }
  const float* const add = numbers_of(bias);
  float* const to = out->typed_data();
  const Kernel* const by = &tiles;
  rows_in_parts(pool, left, [=](int64_t first, int64_t last) { dense_rows(left, *by, add, first, last, to); });
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
}

ffi::Error gated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate, Bias gate_bias, ffi::AnyBuffer up,
                 Bias up_bias, ffi::Buffer<ffi::S32> layer, ffi::Result<ffi::AnyBuffer> out) {
#ifdef FUSED_REC_TILES
  const int64_t at_layer = *layer.typed_data();
  for (const char* const wrong : {problem(x, gate, gate_bias, at_layer), problem(x, up, up_bias, at_layer)}) {
    if (wrong) return ffi::Error::InvalidArgument(wrong);
  }
  const Left left = left_of(x);
  const int64_t columns = gate.dimensions()[2];
  const auto rows = fused_rec::as_rows(*out, left.rows * columns);
  if (up.dimensions()[2] != columns || !rows) {
    return ffi::Error::InvalidArgument("kernels must have one shape, and the result a row for each of x");
  }
  const Kernel one = packed(pool, gate, at_layer, left.parts), other = packed(pool, up, at_layer, left.parts);
  const Gated both{one, other, numbers_of(gate_bias), numbers_of(up_bias), *rows};
  const Gated* const by = &both;
  rows_in_parts(pool, left, [=](int64_t first, int64_t last) { gated_rows(left, *by, first, last); });
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_dense, dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Bias>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_gated, gated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Bias>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Bias>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
