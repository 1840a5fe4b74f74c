// What lies between the products of a transformer layer, and products of bfloat16 with tiles (AMX), for XLA on CPUs;
// fused_rec/text/encoders/packed.py calls them.
//
// XLA passes over the rows once or more for each of sum, mean, variance, normalization and conversion; here a row is
// read and written once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "parts.h"
#include "tiles.h"

namespace ffi = xla::ffi;

namespace {

using fused_rec::at;
using fused_rec::kLanes;
using fused_rec::Lanes;
using fused_rec::Rows;
#ifdef FUSED_REC_TILES
using fused_rec::kBytes;
using fused_rec::kDepth;
using fused_rec::kTile;
using fused_rec::Matrix;
#endif

constexpr int64_t kSmall = 1 << 15;  // numbers that one thread passes over sooner than it wakes another
constexpr int64_t kPartsOfAThread = 4;

// part(first, last) for consecutive rows.
template <typename Part>
void rows_in_parts(ffi::ThreadPool pool, int64_t rows, int64_t columns, Part part) {
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), rows * columns / kSmall));
  const int64_t count = threads == 1 ? 1 : std::min(rows, threads * kPartsOfAThread);
  fused_rec::in_parts(pool, threads, count, [=](int64_t p) { part(rows * p / count, rows * (p + 1) / count); });
}

template <bool kNarrow>
INLINE void gelu_row(const float* x, const float* bias, int64_t columns, float* wide, uint16_t* narrow) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Lanes y = fused_rec::gelu(at(x + c) + at(bias + c));
    if (kNarrow) {
      fused_rec::store_narrow(y, narrow + c);
    } else {
      at(wide + c) = y;
    }
  }
}

FOR_EACH_PROCESSOR void gelu_rows(const float* x, const float* bias, int64_t first, int64_t last, int64_t columns,
                                  float* wide, uint16_t* narrow) {
  for (int64_t row = first; row < last; ++row) {
    const float* const from = x + row * columns;
    if (narrow) {
      gelu_row<true>(from, bias, columns, nullptr, narrow + row * columns);
    } else {
      gelu_row<false>(from, bias, columns, wide + row * columns, nullptr);
    }
  }
}

ffi::Error bias_gelu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> bias,
                     ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = x.dimensions();
  const int64_t columns = bias.element_count();
  if (shape.size() != 2 || shape[1] != columns || columns % kLanes || y->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("rows must have as many numbers as the bias, a multiple of 16");
  }
  const bool narrow = y->element_type() == ffi::BF16;
  if (!narrow && y->element_type() != ffi::F32) return ffi::Error::InvalidArgument("the result must be float");
  const float *const from = x.typed_data(), *const add = bias.typed_data();
  float* const wide = narrow ? nullptr : static_cast<float*>(y->untyped_data());
  uint16_t* const halves = narrow ? static_cast<uint16_t*>(y->untyped_data()) : nullptr;
  rows_in_parts(pool, shape[0], columns,
                [=](int64_t first, int64_t last) { gelu_rows(from, add, first, last, columns, wide, halves); });
  return ffi::Error::Success();
}

struct Norm {
  const float *x, *added, *scale, *bias;
  float* y;  // may be x or added
  int64_t columns;
  float epsilon;
};

FOR_EACH_PROCESSOR void norm_rows(Norm n, int64_t first, int64_t last) {
  const float share = 1.0f / static_cast<float>(n.columns);
  for (int64_t place = first * n.columns; place < last * n.columns; place += n.columns) {
    float* const y = n.y + place;
    Lanes total = {}, squares = {};
    for (int64_t c = 0; c < n.columns; c += kLanes) {
      total += at(y + c) = at(n.x + place + c) + at(n.added + place + c);
    }
    const float mean = fused_rec::sum(total) * share;
    for (int64_t c = 0; c < n.columns; c += kLanes) {
      const Lanes centered = at(y + c) - mean;
      squares += centered * centered;
    }
    const float factor = 1.0f / std::sqrt(fused_rec::sum(squares) * share + n.epsilon);
    for (int64_t c = 0; c < n.columns; c += kLanes) {
      at(y + c) = (at(y + c) - mean) * (at(n.scale + c) * factor) + at(n.bias + c);
    }
  }
}

ffi::Error add_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> added,
                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias, float epsilon,
                    ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = x.dimensions();
  const int64_t columns = scale.element_count();
  const bool equal = added.element_count() == x.element_count() && y->element_count() == x.element_count();
  if (shape.size() != 2 || shape[1] != columns || columns % kLanes || !equal ||
      static_cast<int64_t>(bias.element_count()) != columns) {
    return ffi::Error::InvalidArgument("rows must have as many numbers as scale and bias, a multiple of 16");
  }
  const Norm norm{x.typed_data(), added.typed_data(), scale.typed_data(), bias.typed_data(),
                  y->typed_data(), columns, epsilon};
  rows_in_parts(pool, shape[0], columns, [=](int64_t first, int64_t last) { norm_rows(norm, first, last); });
  return ffi::Error::Success();
}

// RMS normalization (Zhang and Sennrich, 2019, arXiv 1910.07467) of x + added, which takes the place of x.
struct RmsNorm {
  float* x;
  const float *added, *scale;  // added: null for none
  Rows y;
  int64_t columns;
  float epsilon;
};

FOR_EACH_PROCESSOR void rms_rows(RmsNorm n, int64_t first, int64_t last) {
  const float share = 1.0f / static_cast<float>(n.columns);
  for (int64_t place = first * n.columns; place < last * n.columns; place += n.columns) {
    float* const x = n.x + place;
    Lanes squares = {};
    for (int64_t c = 0; c < n.columns; c += kLanes) {
      if (n.added) at(x + c) += at(n.added + place + c);
      squares += at(x + c) * at(x + c);
    }
    const float factor = 1.0f / std::sqrt(fused_rec::sum(squares) * share + n.epsilon);
    for (int64_t c = 0; c < n.columns; c += kLanes) n.y.store(at(x + c) * (at(n.scale + c) * factor), place + c);
  }
}

ffi::Error add_rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> added,
                        ffi::Buffer<ffi::F32> scale, float epsilon, ffi::ResultBuffer<ffi::F32> sum,
                        ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = x.dimensions();
  const int64_t columns = scale.element_count();
  const auto to = fused_rec::as_rows(*y, x.element_count());
  const bool adds = added.element_count() > 0;
  if (shape.size() != 2 || shape[1] != columns || columns % kLanes || !to ||
      (adds && added.element_count() != x.element_count()) || sum->element_count() != x.element_count()) {
    return ffi::Error::InvalidArgument("rows must have as many numbers as the scale, a multiple of 16");
  }
  if (sum->typed_data() != x.typed_data()) std::memcpy(sum->typed_data(), x.typed_data(), x.size_bytes());
  const RmsNorm norm{sum->typed_data(), adds ? added.typed_data() : nullptr, scale.typed_data(), *to, columns, epsilon};
  rows_in_parts(pool, shape[0], columns, [=](int64_t first, int64_t last) { rms_rows(norm, first, last); });
  return ffi::Error::Success();
}

FOR_EACH_PROCESSOR void gate_numbers(const float* gate, const float* up, Rows y, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += kLanes) y.store(fused_rec::silu(at(gate + i)) * at(up + i), i);
}

// silu(gate) * up.
ffi::Error gate_up(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> gate, ffi::Buffer<ffi::F32> up,
                   ffi::Result<ffi::AnyBuffer> y) {
  const int64_t count = gate.element_count();
  const auto to = fused_rec::as_rows(*y, count);
  if (static_cast<int64_t>(up.element_count()) != count || count % kLanes || !to) {
    return ffi::Error::InvalidArgument("both must have as many numbers, a multiple of 16");
  }
  const float *const one = gate.typed_data(), *const other = up.typed_data();
  const Rows rows = *to;
  rows_in_parts(pool, count / kLanes, kLanes, [=](int64_t first, int64_t last) {
    gate_numbers(one, other, rows, first * kLanes, last * kLanes);
  });
  return ffi::Error::Success();
}

constexpr int64_t kRows = 128;  // of a part of `up`: its tiles stay in the cache

#ifdef FUSED_REC_TILES

// gelu(x kernel + bias), x [rows, depth] and kernel [depth, columns], both multiples of 32.
struct Up {
  Matrix<float> x;
  const char* kernel;  // right tiles: those of 16 columns one after the other
  const float* bias;
  uint16_t* y;  // bits of bfloat16
  int64_t columns;
};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16,prefer-vector-width=512")

void pack(Matrix<uint16_t> kernel, int64_t step, char* tiles) {
  fused_rec::right_tiles(kernel, step * kDepth, tiles + step * kBytes, kernel.rows / kDepth * kBytes);
}

void up_rows(const Up& up, int64_t first, int64_t last) {
  const fused_rec::TileRegisters registers;
  const int64_t steps = up.x.columns / kDepth, across = steps * kBytes;
  auto left = fused_rec::scratch<char>(kRows / kTile * across);
  for (int64_t row = first; row < first + kRows; row += kTile) {
    fused_rec::left_tiles(up.x, row, left.get() + (row - first) / kTile * across, kBytes);
  }
  alignas(64) float sums[kDepth * kDepth];
  for (int64_t column = 0; column < up.columns; column += kDepth) {
    const fused_rec::Tiles right{up.kernel + column / kTile * across, 64, kBytes, across};
    for (int64_t row = first; row < last; row += kDepth) {
      const char* const begin = left.get() + (row - first) / kTile * across;
      fused_rec::multiply({begin, 64, kBytes, across}, right, steps, sums, kDepth, false);
      for (int64_t i = row; i < std::min(last, row + kDepth); ++i) {
        const float* const from = sums + (i - row) * kDepth;
        const Lanes low = fused_rec::gelu(at(from) + at(up.bias + column));
        const Lanes high = fused_rec::gelu(at(from + kLanes) + at(up.bias + column + kLanes));
        const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<const __m512&>(high), reinterpret_cast<const __m512&>(low));
        _mm512_storeu_si512(up.y + i * up.columns + column, reinterpret_cast<const __m512i&>(both));
      }
    }
  }
}

#pragma GCC pop_options

#endif

ffi::Error up_gelu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::BF16> kernel,
                   ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::BF16> y) {
#ifdef FUSED_REC_TILES
  const auto from = x.dimensions(), by = kernel.dimensions(), to = y->dimensions();
  if (from.size() != 2 || by.size() != 2 || to.size() != 2 || from[0] != to[0] || from[1] != by[0] || by[1] != to[1] ||
      static_cast<int64_t>(bias.element_count()) != to[1] || by[0] % kDepth || by[1] % kDepth) {
    return ffi::Error::InvalidArgument("rows, kernel, bias and result must fit, with multiples of 32 columns");
  }
  auto tiles = fused_rec::scratch<char>(2 * by[0] * by[1]);
  char* const packed = tiles.get();
  const Matrix<uint16_t> matrix{static_cast<const uint16_t*>(kernel.untyped_data()), by[0], by[1]};
  const Up up{{x.typed_data(), from[0], from[1]}, packed, bias.typed_data(),
              static_cast<uint16_t*>(y->untyped_data()), by[1]};
  const int64_t parts = (from[0] + kRows - 1) / kRows, rows = from[0];
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(pool.num_threads(), parts));
  fused_rec::in_parts(pool, threads, by[0] / kDepth, [=](int64_t step) { pack(matrix, step, packed); });
  fused_rec::in_parts(pool, threads, parts, [=](int64_t part) {
    up_rows(up, part * kRows, std::min(rows, (part + 1) * kRows));
  });
  return ffi::Error::Success();
#else
  return ffi::Error::InvalidArgument("this was compiled without tile registers");
#endif
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_bias_gelu, bias_gelu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_add_norm, add_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_add_rms_norm, add_rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_gate_up, gate_up,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_up_gelu, up_gelu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>());
