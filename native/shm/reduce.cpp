#include "shm/reduce.h"

#include "shm/reduce_loops.h"

namespace shm {
namespace {

struct Arguments {
  void* out;
  void* copy;
  const void* const* sources;
  int count;
  size_t elements;
};

template <typename Loops>
void run(const Arguments& a) {
  reduce_by<Loops>(a.out, a.copy, a.sources, a.count, a.elements);
}

// What wraps is the same of signed and of unsigned integers.
template <class Op>
void of_unsigned(DType dtype, const Arguments& a) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
      return run<Loops<Op, uint8_t>>(a);
    case DType::kInt16:
      return run<Loops<Op, uint16_t>>(a);
    case DType::kInt32:
      return run<Loops<Op, uint32_t>>(a);
    default:
      return run<Loops<Op, uint64_t>>(a);
  }
}

template <class Op>
void of_signed(DType dtype, const Arguments& a) {
  switch (dtype) {
    case DType::kUInt8:
      return run<Loops<Op, uint8_t>>(a);
    case DType::kInt8:
      return run<Loops<Op, int8_t>>(a);
    case DType::kInt16:
      return run<Loops<Op, int16_t>>(a);
    case DType::kInt32:
      return run<Loops<Op, int32_t>>(a);
    default:
      return run<Loops<Op, int64_t>>(a);
  }
}

template <class Op, bool kWraps>
void of_numbers(DType dtype, const Arguments& a) {
  switch (dtype) {
    case DType::kFloat16:
      return run<LoopsOfHalf<Op>>(a);
    case DType::kBFloat16:
      return run<Loops<Op, BFloat16, float>>(a);
    case DType::kFloat32:
      return run<Loops<Op, float>>(a);
    case DType::kFloat64:
      return run<Loops<Op, double>>(a);
    default:
      return kWraps ? of_unsigned<Op>(dtype, a) : of_signed<Op>(dtype, a);
  }
}

template <class Op>
void of_bits(DType dtype, Arguments a) {
  a.elements *= static_cast<size_t>(size_of(dtype));
  run<Loops<Op, uint8_t>>(a);
}

bool is_float(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32 ||
         dtype == DType::kFloat64;
}

// Of truth values, which are 0 and 1, some reductions are others of bits.
Reduction of_truth(Reduction reduction) {
  switch (reduction) {
    case Reduction::kProduct:
    case Reduction::kMin:
      return Reduction::kAnd;
    case Reduction::kMax:
      return Reduction::kOr;
    default:
      return reduction;
  }
}

}  // namespace

size_t reduced_size(Reduction reduction, DType dtype) {
  const bool bits =
      reduction == Reduction::kAnd || reduction == Reduction::kOr || reduction == Reduction::kXor;
  if (bits && is_float(dtype)) return 0;
  const bool adds = reduction == Reduction::kSum || reduction == Reduction::kAverage;
  if (adds && dtype == DType::kBool) return 0;
  return static_cast<size_t>(size_of(dtype));
}

void reduce(Reduction reduction, DType dtype, void* out, void* copy, const void* const* sources,
            int count, size_t elements) {
  const Arguments a{out, copy, sources, count, elements};
  switch (dtype == DType::kBool ? of_truth(reduction) : reduction) {
    case Reduction::kSum:
      return of_numbers<Sum, true>(dtype, a);
    case Reduction::kAverage:
      return of_numbers<Average, false>(dtype, a);
    case Reduction::kProduct:
      return of_numbers<Product, true>(dtype, a);
    case Reduction::kMin:
      return of_numbers<Min, false>(dtype, a);
    case Reduction::kMax:
      return of_numbers<Max, false>(dtype, a);
    case Reduction::kAnd:
      return of_bits<And>(dtype, a);
    case Reduction::kOr:
      return of_bits<Or>(dtype, a);
    case Reduction::kXor:
      return of_bits<Xor>(dtype, a);
  }
}

}  // namespace shm
