// Two small calls for XLA on CPUs: an array as it is, and the row of each edge.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parts.h"

namespace ffi = xla::ffi;

namespace {

// The argument and the result share memory. XLA does not look into a call, so what reads the result is computed from
// it, and not again from what it was made of: that may then be overwritten, and is not copied before.
ffi::Error in_place(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (x.untyped_data() != y->untyped_data()) std::memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  return ffi::Error::Success();
}

// start has where the edges of each row begin, and the end of the last; edges after it are of one row more.
ffi::Error rows_of(ffi::Buffer<ffi::S32> start, ffi::ResultBuffer<ffi::S32> y) {
  const int32_t* begin = start.typed_data();
  int32_t* to = y->typed_data();
  const int64_t rows = static_cast<int64_t>(start.element_count()) - 1, edges = y->element_count();
  if (start.dimensions().size() != 1 || y->dimensions().size() != 1 || rows < 0) {
    return ffi::Error::InvalidArgument("row starts and rows must be vectors");
  }
  for (int64_t v = 0; v < rows; ++v) {
    if (begin[v] < 0 || begin[v] > begin[v + 1]) return ffi::Error::InvalidArgument("row starts must ascend from 0");
  }
  if (begin[rows] > edges) return ffi::Error::InvalidArgument("row starts go beyond the edges");
  for (int64_t v = 0; v < rows; ++v) std::fill(to + begin[v], to + begin[v + 1], static_cast<int32_t>(v));
  std::fill(to + begin[rows], to + edges, static_cast<int32_t>(rows));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_in_place, in_place,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(fused_rec_rows_of, rows_of,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::S32>>());
