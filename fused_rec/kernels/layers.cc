// What lies between the products of a transformer layer, and products of bfloat16 with tiles (AMX), for XLA on CPUs;
// fused_rec/text/encoders/packed.py calls them.
//
// XLA passes over the rows once or more for each of sum, mean, variance, normalization and conversion; here a row is
// read and written once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "parts.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define WITH_TILES
#endif

namespace ffi = xla::ffi;

namespace {

using fused_rec::at;
using fused_rec::kLanes;
using fused_rec::Lanes;

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

// A product with bias: x [rows, depth] times kernel [depth, columns].
struct Product {
  const float* x;          // one of x and narrow_x is given
  const uint16_t* narrow_x;
  const uint16_t* kernel;  // bits of bfloat16
  const float* bias;
  float* y;                // one of y and narrow_y is given
  uint16_t* narrow_y;
  bool gelu;
  int64_t rows, depth, columns;
};

constexpr int64_t kTile = 16;          // rows of a tile, of 64 bytes each: 32 bfloat16 or 16 float32
constexpr int64_t kDeep = 32;          // of the contracted dimension that one tile has
constexpr int64_t kBlock = 2 * kTile;  // rows and columns of four tiles of sums
constexpr int64_t kRows = 128;         // rows of a part
constexpr int64_t kTileSize = kTile * kDeep;

#ifdef WITH_TILES

#define WITH_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512")))

// Whether the processor has tiles of bfloat16 and the system lets this process use them.
bool tiles_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && __builtin_cpu_supports("x86-64-v4");
  if (!tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

// Room for so many numbers that a thread keeps, at the begin of a line of the cache: a tile is read by lines.
template <int kPurpose>
uint16_t* room(int64_t count) {
  constexpr int64_t kLine = 64;
  static thread_local std::vector<uint16_t> numbers;
  numbers.resize(count + kLine / sizeof(uint16_t));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(numbers.data());
  return reinterpret_cast<uint16_t*>((begin + kLine - 1) / kLine * kLine);
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of a kernel: two rows interleaved in one of the tile, 32 columns in two tiles, all depths one after the other.
WITH_AMX void pack(const Product& p, int64_t panel, uint16_t* to) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    for (int half = 0; half < 2; ++half) order[half][i] = static_cast<uint16_t>(16 * half + i / 2 + i % 2 * 32);
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t k = 0; k < p.depth; k += kDeep) {
    for (int64_t r = 0; r < kTile; ++r, to += kDeep) {
      const uint16_t* const from = p.kernel + (k + 2 * r) * p.columns + panel * kBlock;
      const __m512i one = _mm512_loadu_si512(from), two = _mm512_loadu_si512(from + p.columns);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, low, two));
      _mm512_storeu_si512(to + kTileSize, _mm512_permutex2var_epi16(one, high, two));
    }
    to += kTileSize;
  }
}

WITH_AMX INLINE __m512i narrow(const float* x) {
  const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + kLanes), _mm512_loadu_ps(x));
  return reinterpret_cast<const __m512i&>(both);
}

// Tiles of rows: 16 rows in one, all depths one after the other, then the next 16 rows; 0 after the last.
WITH_AMX INLINE void pack_rows(const Product& p, int64_t first, int64_t last, int64_t padded, uint16_t* to) {
  for (int64_t row = first; row < first + padded; ++row) {
    const int64_t from = row * p.depth, place = row - first;
    uint16_t* const tile = to + place / kTile * kTile * p.depth + place % kTile * kDeep;
    for (int64_t k = 0; k < p.depth; k += kDeep) {
      __m512i numbers = _mm512_setzero_si512();
      if (row < last) numbers = p.x ? narrow(p.x + from + k) : _mm512_loadu_si512(p.narrow_x + from + k);
      _mm512_store_si512(tile + k * kTile, numbers);
    }
  }
}

// Up to 32 rows of sums in a buffer to the result, whose columns begin at this one.
WITH_AMX INLINE void finish(const Product& p, const float* sums, int64_t first, int64_t last, int64_t column) {
  for (int64_t row = first; row < last; ++row, sums += kBlock) {
    const int64_t place = row * p.columns + column;
    Lanes y[2];
    for (int half = 0; half < 2; ++half) {
      y[half] = at(sums + half * kLanes) + at(p.bias + column + half * kLanes);
      if (p.gelu) y[half] = fused_rec::gelu(y[half]);
    }
    if (p.narrow_y) {
      _mm512_storeu_si512(p.narrow_y + place, narrow(reinterpret_cast<const float*>(y)));
    } else {
      at(p.y + place) = y[0];
      at(p.y + place + kLanes) = y[1];
    }
  }
}

WITH_AMX void multiply_rows(const Product& p, const uint16_t* packed, int64_t first, int64_t last) {
  const int64_t padded = (last - first + kBlock - 1) / kBlock * kBlock;
  uint16_t* const rows = room<1>(padded * p.depth);
  pack_rows(p, first, last, padded, rows);
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  alignas(64) float sums[kBlock * kBlock];
  constexpr int64_t kLine = kDeep * sizeof(uint16_t), kWidth = kBlock * sizeof(float);
  for (int64_t column = 0; column < p.columns; column += kBlock) {
    for (int64_t row = 0; row < padded; row += kBlock) {
      const uint16_t* x = rows + row * p.depth;
      const uint16_t* kernel = packed + column * p.depth;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < p.depth; k += kDeep, x += kTileSize, kernel += 2 * kTileSize) {
        _tile_loadd(4, x, kLine);
        _tile_loadd(6, kernel, kLine);
        _tile_loadd(7, kernel + kTileSize, kLine);
        _tile_loadd(5, x + kTile * p.depth, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, kWidth);
      _tile_stored(1, sums + kTile, kWidth);
      _tile_stored(2, sums + kTile * kBlock, kWidth);
      _tile_stored(3, sums + kTile * kBlock + kTile, kWidth);
      finish(p, sums, first + row, std::min(last, first + row + kBlock), column);
    }
  }
  _tile_release();
}

void multiply(ffi::ThreadPool pool, const Product& p) {
  uint16_t* const tiles = room<0>(p.depth * p.columns);
  const int64_t panels = p.columns / kBlock, parts = (p.rows + kRows - 1) / kRows;
  const int64_t threads = std::min<int64_t>(pool.num_threads(), parts);
  fused_rec::in_parts(pool, threads, panels, [=](int64_t panel) { pack(p, panel, tiles + panel * kBlock * p.depth); });
  fused_rec::in_parts(pool, threads, parts, [=](int64_t part) {
    multiply_rows(p, tiles, part * kRows, std::min(p.rows, (part + 1) * kRows));
  });
}

#else

bool tiles_usable() { return false; }
void multiply(ffi::ThreadPool, const Product&) {}

#endif

ffi::Error dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U16> kernel, ffi::Buffer<ffi::F32> bias,
                 bool gelu, ffi::Result<ffi::AnyBuffer> y) {
  const auto from = x.dimensions(), by = kernel.dimensions(), to = y->dimensions();
  if (from.size() != 2 || by.size() != 2 || to.size() != 2 || from[0] != to[0] || from[1] != by[0] || by[1] != to[1] ||
      static_cast<int64_t>(bias.element_count()) != to[1]) {
    return ffi::Error::InvalidArgument("rows, kernel, bias and result must fit each other");
  }
  if (by[0] % kDeep || by[1] % kBlock) return ffi::Error::InvalidArgument("a kernel must have multiples of 32");
  for (const auto type : {x.element_type(), y->element_type()}) {
    if (type != ffi::F32 && type != ffi::BF16) return ffi::Error::InvalidArgument("rows must be float32 or bfloat16");
  }
  static const bool usable = tiles_usable();
  if (!usable) return ffi::Error::InvalidArgument("this processor has no tiles of bfloat16");
  const bool wide_x = x.element_type() == ffi::F32, wide_y = y->element_type() == ffi::F32;
  void *const rows = x.untyped_data(), *const out = y->untyped_data();
  multiply(pool, Product{wide_x ? static_cast<float*>(rows) : nullptr,
                         wide_x ? nullptr : static_cast<uint16_t*>(rows), kernel.typed_data(), bias.typed_data(),
                         wide_y ? static_cast<float*>(out) : nullptr, wide_y ? nullptr : static_cast<uint16_t*>(out),
                         gelu, from[0], from[1], to[1]});
  return ffi::Error::Success();
}

}  // namespace

extern "C" bool fused_rec_tiles() { return tiles_usable(); }

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_dense, dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("gelu")
                                  .Ret<ffi::AnyBuffer>());
