// The fused operator's points, worked out from reference points, offsets and logits.
//
// No include guard: this file is included once per instruction set.
#include "deformable_detr/cpu/points.h"

// ---------------------------------------------------------------------------------------- softmax

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

// ----------------------------------------------------------------------------------------- pixels

// Points of `rows` whole rows: their reference points, and how many pixels an offset of one moves
// them.
template <typename acc>
struct Fusion {
  Fusion(const Params& p, const std::vector<Level>& levels, int32_t rows)
      : levels(levels),
        references((rows / p.heads + 2) * p.reference_levels * p.reference_coordinates),
        reference{rows * p.points, rows * p.points},
        unit{rows * p.points, rows * p.points},
        unit_rest{rows * p.points, rows * p.points} {
    for (const Array<acc>& axis : unit) std::fill_n(axis.data(), rows * p.points, acc(1));
  }

  const std::vector<Level>& levels;
  Array<acc> references;                           // of the rows' queries, as they are stored
  Array<acc> reference[2], unit[2], unit_rest[2];  // x and y of each point
};

// Reads the reference points of the rows' queries. Returns how many numbers a query has.
template <typename scalar_t>
MSDA_INLINE int32_t read_references(const Params& p, int64_t first, int32_t rows,
                                    const Fusion<acc_t<scalar_t>>& fusion) {
  const int32_t size = p.reference_levels * p.reference_coordinates;
  const int64_t query = first / p.heads, last = (first + rows - 1) / p.heads;
  load_numbers<scalar_t>(p.reference_points, query * size, int32_t(last - query + 1) * size,
                         fusion.references.data());
  return size;
}

// Works out the points of whole rows, from row `first` on, whose offsets and logits have been read:
// x and y become pixels, x_rest and y_rest what rounding left of them, and weight the softmax.
template <typename scalar_t>
MSDA_INLINE void fuse_points(const Params& p, int64_t first, int32_t rows,
                             const Fusion<acc_t<scalar_t>>& fusion,
                             const Points<acc_t<scalar_t>>& points) {
  using acc = acc_t<scalar_t>;
  const bool box = p.reference_coordinates == 4;
  const int32_t size = read_references<scalar_t>(p, first, rows, fusion);
  int32_t i = 0;
  for (int32_t row = 0; row < rows; ++row) {
    const acc* reference =
        fusion.references.data() + ((first + row) / p.heads - first / p.heads) * size;
    for (int32_t level = 0; level < p.levels; ++level) {
      const int32_t begin = i, end = i + points_of_level(p, level);
      for (; i < end; ++i) {
        fusion.reference[0][i] = reference[0];
        fusion.reference[1][i] = reference[1];
      }
      if (box) {
        const OffsetUnits<acc> units = offset_units<acc>(p, level, fusion.levels[level]);
        const Exact<acc> unit[2] = {multiply(reference[2], units.x),
                                    multiply(reference[3], units.y)};
        for (int32_t axis = 0; axis < 2; ++axis) {
          std::fill(&fusion.unit[axis][begin], &fusion.unit[axis][end], unit[axis].rounded);
          std::fill(&fusion.unit_rest[axis][begin], &fusion.unit_rest[axis][end], unit[axis].rest);
        }
      }
      if (p.reference_levels > 1) reference += p.reference_coordinates;
    }
  }
  const int32_t* const sizes[2] = {points.width.data(), points.height.data()};
  acc* const at[2] = {points.x.data(), points.y.data()};
  acc* const rest[2] = {points.x_rest.data(), points.y_rest.data()};
  for (int32_t axis = 0; axis < 2; ++axis) {
    const acc* reference = fusion.reference[axis].data();
    const acc *unit = fusion.unit[axis].data(), *unit_rest = fusion.unit_rest[axis].data();
    MSDA_NO_ALIASES
    for (int32_t k = 0; k < i; ++k) {
      const Exact<acc> move = multiply(at[axis][k], Exact<acc>{unit[k], unit_rest[k]});
      const Exact<acc> pixel = moved_pixel(reference[k], sizes[axis][k], move);
      at[axis][k] = pixel.rounded;
      rest[axis][k] = pixel.rest;
    }
  }
  softmax(points.weight.data(), rows, p.points);
}
