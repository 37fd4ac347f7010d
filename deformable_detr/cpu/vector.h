// SIMD vectors of the instruction set that is being compiled for: see each_capability.h.
//
// The compiler's own vector types do the arithmetic. Only how the half types are read and written
// is written by hand. No include guard: this file is included once per instruction set.

template <typename acc>
constexpr int32_t kLanes = MSDA_VECTOR_BYTES / sizeof(acc);

// `lanes` numbers; + - * / work on all of them at once.
template <typename T, int32_t lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <typename T, int32_t lanes = kLanes<T>>
using Vector = typename VectorOf<T, lanes>::type;

using Bits16 = Vector<uint16_t, kLanes<float>>;
using Bits32 = Vector<uint32_t, kLanes<float>>;

template <typename To, typename From>
MSDA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The first bytes of `from`.
template <typename To, typename From>
MSDA_INLINE To bit_cast_front(const From& from) {
  static_assert(sizeof(To) <= sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ------------------------------------------------------------------------------------- half types

MSDA_INLINE Vector<float> to_float(Bits16 bits, bfloat16_t) {
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

// Rounds to nearest, ties to even.
MSDA_INLINE Bits16 from_float(Vector<float> x, bfloat16_t) {
  const Bits32 bits = bit_cast<Bits32>(x);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Bits32{} + 0x7fc0, Bits16);
}

#if MSDA_F16C && MSDA_VECTOR_BYTES == 64
MSDA_INLINE Vector<float> to_float(Bits16 bits, half_t) {
  return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits));
}
MSDA_INLINE Bits16 from_float(Vector<float> x, half_t) {
  return bit_cast<Bits16>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
}
#elif MSDA_F16C
MSDA_INLINE Vector<float> to_float(Bits16 bits, half_t) {
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
}
MSDA_INLINE Bits16 from_float(Vector<float> x, half_t) {
  return bit_cast<Bits16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// The biases of the exponents differ by 112. A product corrects that, for denormals too.
MSDA_INLINE Vector<float> to_float(Bits16 bits, half_t) {
  const Bits32 wide = __builtin_convertvector(bits, Bits32);
  const Bits32 magnitude = (wide & 0x7fff) << 13;
  const Bits32 scaled = bit_cast<Bits32>(bit_cast<Vector<float>>(magnitude) * 0x1p112f);
  const Bits32 not_finite = magnitude >= 0x7c00 << 13 ? Bits32{} + 0x7f800000 : Bits32{};
  return bit_cast<Vector<float>>(scaled | not_finite | (wide & 0x8000) << 16);
}
MSDA_INLINE Bits16 from_float(Vector<float> x, half_t) {
  Bits16 bits;
  for (int32_t i = 0; i < kLanes<float>; ++i) bits[i] = half_t(x[i]).x;
  return bits;
}
#endif

// -------------------------------------------------------------------------------- load and store

// The other types are computed with as they are stored.
MSDA_INLINE Vector<float> to_float(Vector<float> x, float) { return x; }
MSDA_INLINE Vector<double> to_float(Vector<double> x, double) { return x; }
MSDA_INLINE Vector<float> from_float(Vector<float> x, float) { return x; }
MSDA_INLINE Vector<double> from_float(Vector<double> x, double) { return x; }
template <typename scalar_t>
using Stored =
    std::conditional_t<std::is_same_v<scalar_t, acc_t<scalar_t>>, Vector<acc_t<scalar_t>>, Bits16>;

template <typename scalar_t>
MSDA_INLINE Vector<acc_t<scalar_t>> load(const scalar_t* from) {
  Stored<scalar_t> stored;
  std::memcpy(&stored, from, sizeof(stored));
  return to_float(stored, scalar_t{});
}
template <typename scalar_t>
MSDA_INLINE void store(scalar_t* to, Vector<acc_t<scalar_t>> x) {
  const Stored<scalar_t> stored = from_float(x, scalar_t{});
  std::memcpy(to, &stored, sizeof(stored));
}

// Stores past the caches what is not read again soon; its old content is not fetched first. The
// address must be aligned to the vector. Call stream_fence() at the end.
template <typename scalar_t>
MSDA_INLINE void stream(scalar_t* to, Vector<acc_t<scalar_t>> x) {
#if defined(__x86_64__)
  const Stored<scalar_t> stored = from_float(x, scalar_t{});
  if constexpr (sizeof(stored) == 64) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(stored));
  } else if constexpr (sizeof(stored) == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(stored));
  } else if constexpr (sizeof(stored) == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(stored));
  }
#endif
  store(to, x);
}
MSDA_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The same for the first `count` lanes only. Loaded, the others are zero.
template <typename scalar_t>
MSDA_INLINE Vector<acc_t<scalar_t>> load(const scalar_t* from, int32_t count) {
  scalar_t buffer[kLanes<acc_t<scalar_t>>] = {};
  for (int32_t i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}
template <typename scalar_t>
MSDA_INLINE void store(scalar_t* to, Vector<acc_t<scalar_t>> x, int32_t count) {
  scalar_t buffer[kLanes<acc_t<scalar_t>>];
  store(buffer, x);
  for (int32_t i = 0; i < count; ++i) to[i] = buffer[i];
}

// Converts `count` numbers. `to_array` is the beginning of an Array.
template <typename scalar_t>
MSDA_INLINE void load_numbers(const scalar_t* from, int32_t count, acc_t<scalar_t>* to_array) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  int32_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to_array + i, load(from + i));
  if (i < count) store(to_array + i, load(from + i, count - i));
}
template <typename scalar_t>
MSDA_INLINE void store_numbers(const acc_t<scalar_t>* from_array, int32_t count, scalar_t* to) {
  constexpr int32_t lanes = kLanes<acc_t<scalar_t>>;
  int32_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from_array + i));
  if (i < count) store(to + i, load(from_array + i), count - i);
}

// The same for an operand, which is stored as value is or as acc, from index `first` on.
template <typename scalar_t>
MSDA_INLINE void load_numbers(const Operand& operand, int64_t first, int32_t count,
                              acc_t<scalar_t>* to_array) {
  using acc = acc_t<scalar_t>;
  if (operand.dtype == kDType<scalar_t>) {
    load_numbers(static_cast<const scalar_t*>(operand.data) + first, count, to_array);
  } else {
    load_numbers(static_cast<const acc*>(operand.data) + first, count, to_array);
  }
}
template <typename scalar_t>
MSDA_INLINE void store_numbers(const acc_t<scalar_t>* from_array, int32_t count, int64_t first,
                               void* tensor, DType dtype) {
  using acc = acc_t<scalar_t>;
  if (dtype == kDType<scalar_t>) {
    store_numbers(from_array, count, static_cast<scalar_t*>(tensor) + first);
  } else {
    store_numbers(from_array, count, static_cast<acc*>(tensor) + first);
  }
}

// The rows of a head lie a kilobyte or more apart, which the processor's own prefetching does not
// foresee. So the row that comes kRowsAhead later is prefetched, whether there is one or not.
constexpr int32_t kRowsAhead = 32;

template <bool write, typename T>
MSDA_INLINE void prefetch(const T* row, int64_t stride, int32_t size) {
  const char* from = reinterpret_cast<const char*>(row + kRowsAhead * stride);
  for (int32_t i = 0; i < size * int32_t(sizeof(T)); i += 64) __builtin_prefetch(from + i, 0, 2);
}

// ----------------------------------------------------------------------------------------- sums

// Takes the lanes of a and then of b in groups of `group`, and adds up the two halves of each
// group.
template <int32_t group, typename V, size_t... i>
MSDA_INLINE V add_halves(V a, V b, std::index_sequence<i...>) {
  constexpr size_t half = group / 2;
  return __builtin_shufflevector(a, b, (i / half * group + i % half)...) +
         __builtin_shufflevector(a, b, (i / half * group + i % half + half)...);
}
template <int32_t group, typename V>
MSDA_INLINE V add_halves(V a, V b) {
  return add_halves<group>(a, b, std::make_index_sequence<sizeof(V) / sizeof(a[0])>{});
}

// sum[i] += the sum of the lanes of x[i].
template <typename acc>
MSDA_INLINE void add_sums(const Vector<acc> (&x)[4], acc* sum) {
  constexpr int32_t lanes = kLanes<acc>;
  const Vector<acc> pairs[2] = {add_halves<lanes>(x[0], x[1]), add_halves<lanes>(x[2], x[3])};
  if constexpr (lanes == 2) {
    store(sum, load(sum) + pairs[0]);
    store(sum + 2, load(sum + 2) + pairs[1]);
  } else {
    Vector<acc> all = add_halves<lanes / 2>(pairs[0], pairs[1]);
    if constexpr (lanes >= 16) all = add_halves<4>(all, all);
    if constexpr (lanes >= 8) all = add_halves<2>(all, all);
    Vector<acc, 4> result;
    std::memcpy(&result, sum, sizeof(result));
    result += bit_cast_front<Vector<acc, 4>>(all);
    std::memcpy(sum, &result, sizeof(result));
  }
}
