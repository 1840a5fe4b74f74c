// Sixteen float32 numbers at a time, as the compiler has them for each generation of processors.

#ifndef FUSED_REC_KERNELS_LANES_H_
#define FUSED_REC_KERNELS_LANES_H_

#include <algorithm>
#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace fused_rec {

constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));

INLINE const Lanes& at(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
INLINE Lanes& at(float* x) { return *reinterpret_cast<Lanes*>(x); }

INLINE float sum(Lanes x) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// exp of numbers up to 0: 2^n e^f with |f| at most half of log 2, where eight terms of the series of exp are enough.
INLINE Lanes exponential(Lanes x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes n = (x * 1.44269504f + kRound) - kRound;
  const Lanes f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first of few bits
  Lanes e = f * (1.0f / 5040) + 1.0f / 720;
  e = e * f + 1.0f / 120;
  e = e * f + 1.0f / 24;
  e = e * f + 1.0f / 6;
  e = e * f + 0.5f;
  e = e * f + 1.0f;
  e = e * f + 1.0f;
  const Bits power = (__builtin_convertvector(n, Bits) + 127) << 23;
  return e * reinterpret_cast<const Lanes&>(power);
}

// GELU (Hendrycks and Gimpel, 2016, arXiv 1606.08415), x times the normal distribution function. erf is the rational
// approximation of Eigen and XLA, which is 1 in float32 from 4 on.
INLINE Lanes gelu(Lanes x) {
  Lanes z = x * 0.707106781f;
  z = z < -4.0f ? Lanes{} - 4.0f : z;
  z = z > 4.0f ? Lanes{} + 4.0f : z;
  const Lanes s = z * z;
  Lanes p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  Lanes q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  const Lanes half = x * 0.5f;
  return half + half * (z * p / q);
}

// SiLU (Elfwing et al., 2017, arXiv 1702.03118), x times the logistic function.
INLINE Lanes silu(Lanes x) {
  const Lanes e = exponential(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : Lanes{} + 1.0f) / (e + 1.0f);
}

typedef uint32_t Wide __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));

// The bits of the nearest bfloat16, of two the even one, in the upper halves; the lower ones are arbitrary.
INLINE Wide rounded(Lanes x) {
  const Wide bits = reinterpret_cast<const Wide&>(x);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

// bfloat16 is the upper half of a float32.
INLINE void store_narrow(Lanes x, uint16_t* to) {
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
  *reinterpret_cast<Narrow*>(to) = __builtin_convertvector(rounded(x) >> 16, Narrow);
}

// A matrix of float32, or of bfloat16 in parts that add up to the numbers: one, which rounds, or three, which do not.
struct Rows {
  float* wide;       // null for bfloat16
  uint16_t* narrow;  // null for float32
  int64_t parts, plane;  // plane: numbers of a part

  INLINE void store(Lanes x, int64_t place) const {
    if (wide) {
      at(wide + place) = x;
      return;
    }
    store_narrow(x, narrow + place);
    for (int64_t part = 1; part < parts; ++part) {
      const Wide upper = rounded(x) & 0xffff0000;
      x -= reinterpret_cast<const Lanes&>(upper);
      store_narrow(x, narrow + part * plane + place);
    }
  }

  // Zeros for the numbers first to last.
  void clear(int64_t first, int64_t last) const {
    if (wide) std::fill(wide + first, wide + last, 0.0f);
    for (int64_t part = 0; narrow && part < parts; ++part) {
      std::fill(narrow + part * plane + first, narrow + part * plane + last, uint16_t{0});
    }
  }
};

}  // namespace fused_rec

#endif  // FUSED_REC_KERNELS_LANES_H_
