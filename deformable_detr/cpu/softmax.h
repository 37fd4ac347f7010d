// The softmax of the fused operator's logits.
//
// No include guard: this file is included once per instruction set.

// exp(x) for x <= 0, to 8e-8: 2^power * exp(r) with |r| <= log(2) / 2, and exp(r) = 1 + r + r^2 *
// y. The coefficients of y are a least-squares fit of the relative error; each was rounded before
// the next was fitted.
MSDA_INLINE float exponential(float x) {
  constexpr float kLog2 = 1.44269504088896341f;
  constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // log(2) in two parts
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float shifted = x * kLog2 + kRound;
  const float power = shifted - kRound;
  const float r = (x - power * kHigh) - power * kLow;
  float y = 1.957021886e-4f;
  y = y * r + 1.393541577e-3f;
  y = y * r + 8.333895355e-3f;
  y = y * r + 4.166645929e-2f;
  y = y * r + 1.666666418e-1f;
  y = y * r + 0.5f;
  y = y * r * r + r + 1;
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound) + 127;
  const float result = y * bit_cast<float>(static_cast<uint32_t>(exponent) << 23);
  return x < -87 ? 0.f : result;
}
MSDA_INLINE double exponential(double x) { return std::exp(x); }

// The softmax of each row's `size` numbers, in place.
template <typename acc>
MSDA_INLINE void softmax(acc* x, int32_t rows, int32_t size) {
  for (int32_t row = 0; row < rows; ++row) {
    acc* const of_row = x + row * size;
    acc largest = of_row[0];
    for (int32_t i = 1; i < size; ++i) largest = std::max(largest, of_row[i]);
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < size; ++i) of_row[i] -= largest;
  }
  MSDA_NO_ALIASES
  for (int32_t i = 0; i < rows * size; ++i) x[i] = exponential(x[i]);
  for (int32_t row = 0; row < rows; ++row) {
    acc* const of_row = x + row * size;
    acc sum = 0;
    for (int32_t i = 0; i < size; ++i) sum += of_row[i];
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < size; ++i) of_row[i] /= sum;
  }
}

// Turns the gradients of rows' weights into those of their logits, in place.
template <typename acc>
MSDA_INLINE void differentiate_softmax(const acc* weight, int32_t rows, int32_t size,
                                       acc* grad_weight) {
  for (int32_t row = 0; row < rows; ++row, weight += size, grad_weight += size) {
    acc mean = 0;
    for (int32_t i = 0; i < size; ++i) mean += weight[i] * grad_weight[i];
    MSDA_NO_ALIASES
    for (int32_t i = 0; i < size; ++i) grad_weight[i] = weight[i] * (grad_weight[i] - mean);
  }
}
