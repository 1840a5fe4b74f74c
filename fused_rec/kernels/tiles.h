// Products of bfloat16 matrices with float32 sums by AMX, the tile registers of newer Xeon processors.
//
// A tile of a left factor is 16 rows of 32 numbers. A tile of a right factor is 32 rows of 16 numbers, of which two rows
// at a time are interleaved: line p has, for each column, the numbers of the rows 2p and 2p + 1. Tiles take 1 KiB.

#ifndef FUSED_REC_KERNELS_TILES_H_
#define FUSED_REC_KERNELS_TILES_H_

// Compilers that know these instructions; whether the processor has them is asked at run time.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSED_REC_TILES 1

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

#define INLINE inline __attribute__((always_inline))

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

namespace fused_rec {

constexpr int64_t kTile = 16;    // rows of a left tile, columns of a right one
constexpr int64_t kDepth = 32;   // what one instruction sums over
constexpr int64_t kBytes = 1024;  // of a tile

inline int64_t padded(int64_t n) { return (n + kDepth - 1) / kDepth * kDepth; }

struct Free {
  void operator()(void* x) const { std::free(x); }
};

using Storage = std::unique_ptr<char[], Free>;

// Aligned memory; its contents are undefined.
template <typename T>
std::unique_ptr<T[], Free> scratch(int64_t count) {
  const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

// Tile registers of 16 rows of 64 bytes, as long as this exists.
struct TileRegisters {
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64, shapes.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }
  ~TileRegisters() { asm volatile("tilerelease" : : : "memory"); }
};

// Where the tiles of a factor lie, in bytes: lines of a tile, tiles along the sum, neighboring tiles across it.
struct Tiles {
  const void* begin;
  int64_t line, along, across;
};

// Adds a b, 32 x 32 numbers over `steps` tiles each, to the sums in the tile registers 0 to 3.
INLINE void accumulate(Tiles a, Tiles b, int64_t steps) {
  const char* left = static_cast<const char*>(a.begin);
  const char* right = static_cast<const char*>(b.begin);
  asm volatile("" : : : "memory");  // the intrinsics do not tell the compiler what memory they read
  for (int64_t step = 0; step < steps; ++step, left += a.along, right += b.along) {
    _tile_loadd(4, left, a.line);
    _tile_loadd(6, right, b.line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + b.across, b.line);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + a.across, a.line);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// line: floats between rows of c.
INLINE void store_sums(float* c, int64_t line) {
  float* const below = c + kTile * line;
  const int64_t bytes = line * sizeof(float);
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTile, bytes);
  _tile_stored(2, below, bytes);
  _tile_stored(3, below + kTile, bytes);
  asm volatile("" : : : "memory");
}

// c = a b, or c + a b: 32 x 32 numbers, over `steps` tiles each. line: floats between rows of c.
INLINE void multiply(Tiles a, Tiles b, int64_t steps, float* c, int64_t line, bool add) {
  if (add) {
    float* const below = c + kTile * line;
    const int64_t bytes = line * sizeof(float);
    asm volatile("" : : : "memory");
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kTile, bytes);
    _tile_loadd(2, below, bytes);
    _tile_loadd(3, below + kTile, bytes);
  } else {
    clear_sums();
  }
  accumulate(a, b, steps);
  store_sums(c, line);
}

// Sixteen numbers of each of two rows, as bfloat16 one row after the other; only `columns` are read, the others are 0.
INLINE __m512i two_rows(const uint16_t* one, const uint16_t* other, int64_t columns) {
  const __mmask16 there = columns < kTile ? (1u << (columns < 0 ? 0 : columns)) - 1 : 0xffff;
  const __m256i low = one ? _mm256_maskz_loadu_epi16(there, one) : _mm256_setzero_si256();
  const __m256i high = other ? _mm256_maskz_loadu_epi16(there, other) : _mm256_setzero_si256();
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

INLINE __m512i two_rows(const float* one, const float* other, int64_t columns) {
  const __mmask16 there = columns < kTile ? (1u << (columns < 0 ? 0 : columns)) - 1 : 0xffff;
  const __m512 low = one ? _mm512_maskz_loadu_ps(there, one) : _mm512_setzero_ps();
  const __m512 high = other ? _mm512_maskz_loadu_ps(there, other) : _mm512_setzero_ps();
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The bfloat16 nearest to the numbers of two rows, one row after the other, and in place what they lack.
INLINE __m512i next_part(__m512& one, __m512& other) {
  const __m512i part = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(other, one));
  const auto wide = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  one = _mm512_sub_ps(one, wide(_mm512_castsi512_si256(part)));
  other = _mm512_sub_ps(other, wide(_mm512_extracti64x4_epi64(part, 1)));
  return part;
}

// Two rows of 16 numbers as one line of a right tile.
INLINE __m512i interleaved(__m512i rows) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), rows);
}

// Transposes 16 lines of 16 pairs.
INLINE void transpose(__m512i (&x)[kTile]) {
  __m512i y[kTile];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0x88);
      y[i + 4 + j] = _mm512_shuffle_i32x4(x[i + j], x[i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
    x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
  }
}

// A matrix in memory, of float32 or bfloat16; what lies outside of it is 0.
template <typename T>
struct Matrix {
  const T* begin;
  int64_t rows, columns;

  const T* at(int64_t row, int64_t column) const {
    return row < rows && column < columns ? begin + row * columns + column : nullptr;
  }
};

// The right tiles of 32 rows, `along` bytes apart: rows are read one after the other, as memory likes it.
template <typename T>
INLINE void right_tiles(Matrix<T> x, int64_t row, char* tiles, int64_t along) {
  for (int64_t p = 0; p < kTile; ++p, tiles += 64) {
    char* to = tiles;
    for (int64_t column = 0; column < padded(x.columns); column += kTile, to += along) {
      const T *one = x.at(row + 2 * p, column), *other = x.at(row + 2 * p + 1, column);
      _mm512_store_si512(to, interleaved(two_rows(one, other, x.columns - column)));
    }
  }
}

// From a right tile of x the left tile of its transpose, in place.
INLINE void transpose_tile(char* tile) {
  __m512i lines[kTile];
  for (int64_t i = 0; i < kTile; ++i) lines[i] = _mm512_load_si512(tile + 64 * i);
  transpose(lines);
  for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(tile + 64 * i, lines[i]);
}

// The left tiles of 16 rows, `along` bytes apart.
INLINE void left_tiles(Matrix<uint16_t> x, int64_t row, char* tiles, int64_t along) {
  for (int64_t i = 0; i < kTile; ++i, tiles += 64) {
    char* to = tiles;
    for (int64_t column = 0; column < x.columns; column += kDepth, to += along) {
      const uint16_t* const from = x.at(row + i, column);
      const int64_t columns = std::min(kDepth, x.columns - column);
      const __mmask32 there = columns < kDepth ? (1u << columns) - 1 : 0xffffffff;
      _mm512_store_si512(to, from ? _mm512_maskz_loadu_epi16(there, from) : _mm512_setzero_si512());
    }
  }
}

INLINE void left_tiles(Matrix<float> x, int64_t row, char* tiles, int64_t along) {
  for (int64_t i = 0; i < kTile; ++i, tiles += 64) {
    char* to = tiles;
    for (int64_t column = 0; column < x.columns; column += kDepth, to += along) {
      const float *one = x.at(row + i, column), *other = x.at(row + i, column + kTile);
      const int64_t columns = std::min(kTile, x.columns - column), more = std::min(kTile, x.columns - column - kTile);
      const __m512 low = one ? _mm512_maskz_loadu_ps((1u << columns) - 1, one) : _mm512_setzero_ps();
      const __m512 high = other ? _mm512_maskz_loadu_ps((1u << more) - 1, other) : _mm512_setzero_ps();
      _mm512_store_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

}  // namespace fused_rec

#pragma GCC pop_options

#endif  // compilers

#endif  // FUSED_REC_KERNELS_TILES_H_
