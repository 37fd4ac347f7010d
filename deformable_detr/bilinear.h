// What a sampling point means: the geometry of sampling, once for host and device.
//
// A level is a map of height x width pixels inside value's flattened spatial dimension. A location
// (x, y) in [0, 1] lies at pixel (x * width - 0.5, y * height - 0.5). Its sample is the weighted
// sum of its corners, the four pixels around it. The corner weights are
//
//     nw -- ne        nw: (1 - right) * (1 - down)    ne: right * (1 - down)
//     |  .   |        sw: (1 - right) * down          se: right * down
//     sw -- se
//
// where right and down in [0, 1) are the point's distances from nw. A corner outside the map
// contributes zero. So a point that lies more than a pixel outside, or is not finite, contributes
// nothing.
//
// Nearest sampling (RT-DETRv2's "discrete") takes a single pixel: (floor(x * width + 0.5),
// floor(y * height + 0.5)), clamped to the map. Its derivative by location is zero; d_location_x
// and d_location_y are for bilinear sampling only.
//
// Pixel coordinates are computed in acc_t, and float holds each integer only up to 2^24.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MSDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MSDA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ms_deform_attn {

struct alignas(16) Level {
  int32_t height;
  int32_t width;
  int32_t start;  // index of the first pixel in value's spatial dimension

  MSDA_HOST_DEVICE bool has_pixel(int32_t pixel) const {
    return static_cast<uint32_t>(pixel - start) < static_cast<uint32_t>(height * width);
  }
  MSDA_HOST_DEVICE bool overlaps(const Level& other) const {
    return height > 0 && other.height > 0 && (has_pixel(other.start) || other.has_pixel(start));
  }
};

// The level if it lies inside value, else an empty level, which contributes zero.
MSDA_HOST_DEVICE Level make_level(int64_t height, int64_t width, int64_t start,
                                  int64_t spatial_size) {
  const bool fits = height > 0 && width > 0 && start >= 0 && height <= spatial_size &&
                    width <= spatial_size && height * width <= spatial_size - start;
  if (!fits) return {0, 0, 0};
  return {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start)};
}

constexpr int32_t kOutside = -1;

// A number in twice the precision of acc_t: rounded, and what the rounding left.
template <typename acc_t>
struct Exact {
  acc_t rounded, rest;
};

template <typename acc_t>
MSDA_HOST_DEVICE Exact<acc_t> exact(double x) {
  const acc_t rounded = static_cast<acc_t>(x);
  return {rounded, static_cast<acc_t>(x - rounded)};
}

template <typename acc_t>
MSDA_HOST_DEVICE Exact<acc_t> multiply(acc_t a, acc_t b) {
  const acc_t product = a * b;
  return {product, std::fma(a, b, -product)};
}

template <typename acc_t>
MSDA_HOST_DEVICE Exact<acc_t> multiply(acc_t a, const Exact<acc_t>& b) {
  const acc_t product = a * b.rounded;
  return {product, std::fma(a, b.rounded, -product) + a * b.rest};
}

// One axis of a reference point that is moved by some pixels: reference * size + move - 0.5. The
// terms may cancel, so their rounding errors are added to the sum.
template <typename acc_t>
MSDA_HOST_DEVICE Exact<acc_t> moved_pixel(acc_t reference, int32_t size, const Exact<acc_t>& move) {
  const Exact<acc_t> from = multiply(reference, static_cast<acc_t>(size));
  const acc_t sum = from.rounded + move.rounded, added = sum - from.rounded;
  const acc_t sum_error = (from.rounded - (sum - added)) + (move.rounded - added);
  const acc_t shifted = sum - acc_t(0.5);
  const acc_t error = (((sum - shifted) - acc_t(0.5)) + sum_error) + (from.rest + move.rest);
  const acc_t pixel = shifted + error;
  return {pixel, (shifted - pixel) + error};
}

// One axis of a location: location * size - 0.5.
//
// Rounding the product alone misplaces a point on a map 300 pixels wide by 1e-5 pixels, and puts
// one in a few thousand on the wrong side of a pixel centre, where the gradient jumps. So the
// errors of the product (fma) and of the subtraction are kept.
template <typename acc_t>
MSDA_HOST_DEVICE Exact<acc_t> located_pixel(acc_t location, int32_t size) {
  const Exact<acc_t> product = multiply(location, static_cast<acc_t>(size));
  const acc_t pixel = product.rounded - acc_t(0.5);
  return {pixel, product.rest + ((product.rounded - pixel) - acc_t(0.5))};
}

// One axis of a pixel, split into its floor and its fraction.
template <typename acc_t>
struct Coordinate {
  acc_t floor;
  acc_t fraction;

  MSDA_HOST_DEVICE explicit Coordinate(acc_t pixel)
      : floor(std::floor(pixel)), fraction(pixel - floor) {}
  MSDA_HOST_DEVICE explicit Coordinate(const Exact<acc_t>& pixel) {
    floor = std::floor(pixel.rounded);
    floor -= ((pixel.rounded == floor) & (pixel.rest < 0)) ? acc_t(1) : acc_t(0);
    fraction = (pixel.rounded - floor) + pixel.rest;
  }

  // Whether this pixel or the next lies in [0, size). False for NaN and infinity.
  MSDA_HOST_DEVICE bool touches(int32_t size) const {
    return (floor >= -1) & (floor < static_cast<acc_t>(size));
  }

  // floor(location * size + 0.5) clamped to [0, size), or kOutside if it is not finite.
  MSDA_HOST_DEVICE int32_t nearest(int32_t size) const {
    const acc_t pixel = floor + 1, last = static_cast<acc_t>(size - 1);
    const bool inside = (pixel > 0) & (pixel < last);
    const int32_t clamped = pixel >= last ? size - 1 : 0;
    const int32_t index = inside ? static_cast<int32_t>(inside ? pixel : acc_t(0)) : clamped;
    return ((floor - floor == 0) & (size > 0)) ? index : kOutside;
  }
};

enum class Method : int8_t { bilinear, nearest };

// Whether index lies in [0, size). One comparison serves both bounds.
MSDA_HOST_DEVICE bool is_inside(int32_t index, int32_t size) {
  return static_cast<uint32_t>(index) < static_cast<uint32_t>(size);
}

// The four corners of a point, in the order nw, ne, sw, se.
template <typename acc_t>
struct Corners {
  int32_t pixel[4];  // index in value's spatial dimension, or kOutside
  acc_t right, down;

  MSDA_HOST_DEVICE Corners() : pixel{kOutside, kOutside, kOutside, kOutside}, right(0), down(0) {}

  // There are no branches, so that the compiler vectorises a loop over points.
  MSDA_HOST_DEVICE Corners(const Coordinate<acc_t>& x, const Coordinate<acc_t>& y,
                           const Level& level) {
    const bool touches_x = x.touches(level.width), touches_y = y.touches(level.height);
    const bool touches = touches_x & touches_y;
    right = touches ? x.fraction : acc_t(0);
    down = touches ? y.fraction : acc_t(0);
    // A point that touches no pixel is put where neither its column and row nor the next are
    // inside. (The compiler would propagate a constant into branches, and then not vectorise the
    // loop.)
    const int32_t column = touches ? static_cast<int32_t>(x.floor) : -1 - level.width;
    const int32_t row = touches ? static_cast<int32_t>(y.floor) : -1 - level.height;
    const bool west = is_inside(column, level.width), east = is_inside(column + 1, level.width);
    const bool north = is_inside(row, level.height), south = is_inside(row + 1, level.height);
    // Unsigned, because the index of a corner outside may overflow.
    const uint32_t width = static_cast<uint32_t>(level.width);
    const uint32_t nw = level.start + row * width + column, sw = nw + width;
    pixel[0] = (north & west) ? static_cast<int32_t>(nw) : kOutside;
    pixel[1] = (north & east) ? static_cast<int32_t>(nw + 1) : kOutside;
    pixel[2] = (south & west) ? static_cast<int32_t>(sw) : kOutside;
    pixel[3] = (south & east) ? static_cast<int32_t>(sw + 1) : kOutside;
  }

  // Nearest sampling has its pixel as nw, with a corner weight of one; the others are outside.
  MSDA_HOST_DEVICE Corners(const Coordinate<acc_t>& x, const Coordinate<acc_t>& y,
                           const Level& level, Method method)
      : Corners() {
    if (method == Method::bilinear) {
      *this = Corners(x, y, level);
      return;
    }
    const int32_t column = x.nearest(level.width), row = y.nearest(level.height);
    const bool inside = (column != kOutside) & (row != kOutside);
    pixel[0] = inside ? level.start + row * level.width + column : kOutside;
  }

  // The first corner that is inside, or kOutside.
  MSDA_HOST_DEVICE int32_t first_pixel() const {
    for (int corner = 0; corner < 3; ++corner) {
      if (pixel[corner] != kOutside) return pixel[corner];
    }
    return pixel[3];
  }

  MSDA_HOST_DEVICE acc_t corner_weight(int corner) const {
    return (corner & 1 ? right : 1 - right) * (corner & 2 ? down : 1 - down);
  }

  // The sample's derivatives by location (not by pixel). A corner outside has the value zero.
  MSDA_HOST_DEVICE acc_t d_location_x(const acc_t (&corner)[4], const Level& level) const {
    return static_cast<acc_t>(level.width) *
           ((1 - down) * (corner[1] - corner[0]) + down * (corner[3] - corner[2]));
  }
  MSDA_HOST_DEVICE acc_t d_location_y(const acc_t (&corner)[4], const Level& level) const {
    return static_cast<acc_t>(level.height) *
           ((1 - right) * (corner[2] - corner[0]) + right * (corner[3] - corner[1]));
  }
  MSDA_HOST_DEVICE acc_t sample(const acc_t (&corner)[4]) const {
    return (1 - down) * ((1 - right) * corner[0] + right * corner[1]) +
           down * ((1 - right) * corner[2] + right * corner[3]);
  }
};

}  // namespace ms_deform_attn
