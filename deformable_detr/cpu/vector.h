// SIMD vectors of the instruction set that is being compiled for: see each_capability.h.
//
// The compiler's own vector types do the arithmetic. Only how the half types are read and written
// is written by hand. No include guard: this file is included once per instruction set.

template <int32_t value>
using Constant = std::integral_constant<int32_t, value>;

template <typename acc>
constexpr int32_t kLanes = MSDA_VECTOR_BYTES / sizeof(acc);

// `lanes` numbers; + - * / work on all of them at once.
template <typename T, int32_t lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <typename T, int32_t lanes = kLanes<T>>
using Vector = typename VectorOf<T, lanes>::type;

// How a number is copied: the compiler vectorises no copies of the half types, which are structs.
template <typename scalar_t>
using Bits = std::conditional_t<std::is_same_v<scalar_t, acc_t<scalar_t>>, scalar_t, uint16_t>;

using Bits16 = Vector<uint16_t, kLanes<float>>;
using Bits32 = Vector<uint32_t, kLanes<float>>;

// The first bytes of `from`, most often all of them.
template <typename To, typename From>
MSDA_INLINE To bit_cast(const From& from) {
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
using Stored = Vector<Bits<scalar_t>, kLanes<acc_t<scalar_t>>>;

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

// Converts `count` numbers between acc and how they are stored.
template <typename From, typename To>
MSDA_INLINE void convert(const From* from, int32_t count, To* to) {
  constexpr int32_t lanes = kLanes<acc_t<From>>;
  int32_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, count - i), count - i);
}

// Calls function(zero) for the type of an operand, which is stored as value is or as acc.
template <typename scalar_t, typename Function>
MSDA_INLINE void dispatch_operand(DType dtype, const Function& function) {
  if (std::is_same_v<scalar_t, acc_t<scalar_t>> || dtype == kDType<scalar_t>) {
    function(scalar_t{});
  } else {
    function(acc_t<scalar_t>{});
  }
}

// Reads `count` numbers of an operand, from index `first` on.
template <typename scalar_t>
MSDA_INLINE void read_numbers(const Operand& operand, int64_t first, int32_t count,
                              acc_t<scalar_t>* to) {
  dispatch_operand<scalar_t>(operand.dtype, [&](auto zero) MSDA_INLINE_LAMBDA {
    convert(static_cast<const decltype(zero)*>(operand.data) + first, count, to);
  });
}

// Writes as many, into a tensor of such a dtype.
template <typename scalar_t>
MSDA_INLINE void write_numbers(const acc_t<scalar_t>* from, int32_t count, void* tensor,
                               DType dtype, int64_t first) {
  dispatch_operand<scalar_t>(dtype, [&](auto zero) MSDA_INLINE_LAMBDA {
    convert(from, count, static_cast<decltype(zero)*>(tensor) + first);
  });
}

// function(a constant, c) with as many channels as that constant's number of registers has lanes,
// from channel c on. Returns the number of channels done: those left do not fill a register.
template <typename acc, typename Function>
MSDA_INLINE int32_t for_registers(int32_t channels, const Function& function) {
  constexpr int32_t lanes = kLanes<acc>;
  int32_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) function(Constant<4>{}, c);
  for (; c + 2 * lanes <= channels; c += 2 * lanes) function(Constant<2>{}, c);
  for (; c + lanes <= channels; c += lanes) function(Constant<1>{}, c);
  return c;
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
    result += bit_cast<Vector<acc, 4>>(all);
    std::memcpy(sum, &result, sizeof(result));
  }
}
