// What a sampling point means: the geometry of sampling, once for host and device.
//
// A level is a map of height x width pixels inside value's flattened spatial dimension. A location
// (x, y) in [0, 1] lies at pixel (x * width - 0.5, y * height - 0.5). Its sample is the sum over
// the four pixels around it, each times its share:
//
//     nw -- ne        share(nw) = (1 - right) * (1 - down)    share(ne) = right * (1 - down)
//     |  .   |        share(sw) = (1 - right) * down          share(se) = right * down
//     sw -- se
//
// where right and down in [0, 1) are the point's distances from nw. A pixel outside the map
// contributes zero, so a point more than a pixel outside, or not finite, has none at all.
//
// Nearest sampling (RT-DETRv2's "discrete") takes one pixel whole: (floor(x * width + 0.5),
// floor(y * height + 0.5)), moved into the map. It has no gradient by location.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MSDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MSDA_HOST_DEVICE inline
#endif

namespace ms_deform_attn {

struct alignas(16) Level {
  int32_t height;
  int32_t width;
  int32_t start;  // of the level's first pixel in value's spatial dimension
};

// The level if it lies inside value, else an empty one, which contributes zero.
MSDA_HOST_DEVICE Level make_level(int64_t height, int64_t width, int64_t start,
                                  int64_t spatial_size) {
  const bool fits = height > 0 && width > 0 && start >= 0 && height <= spatial_size &&
                    width <= spatial_size && height * width <= spatial_size - start;
  if (!fits) return {0, 0, 0};
  return {static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start)};
}

// One axis of a location: pixel = location * size - 0.5, split into its floor and the rest.
//
// Rounding the product alone would misplace a point on a map 300 pixels wide by 1e-5 pixels, and
// put one in a few thousand on the wrong side of a pixel centre, where the gradient jumps. So the
// errors of the product (fma) and of the subtraction are kept and added to the fraction.
template <typename acc_t>
struct Coordinate {
  int32_t floor;
  acc_t fraction;

  MSDA_HOST_DEVICE Coordinate(acc_t location, int32_t size) {
    const acc_t product = location * static_cast<acc_t>(size);
    const acc_t pixel = product - acc_t(0.5);
    const acc_t error =
        std::fma(location, static_cast<acc_t>(size), -product) + ((product - pixel) - acc_t(0.5));
    const acc_t down = std::floor(pixel);
    const acc_t rest = (pixel - down) + error;
    // The true pixel is just below the rounded one, which is whole.
    const bool below = rest < 0;
    fraction = below ? rest + 1 : rest;
    floor = to_index(down, size) - (below ? 1 : 0);
  }

  // Whether the pixel, or the one after it, lies in [0, size). False for NaN and infinity.
  MSDA_HOST_DEVICE bool is_inside(int32_t size) const {
    return static_cast<uint32_t>(floor) < static_cast<uint32_t>(size);
  }
  MSDA_HOST_DEVICE bool next_is_inside(int32_t size) const {
    return static_cast<uint32_t>(floor) + 1u < static_cast<uint32_t>(size);
  }

 private:
  // A number that is not finite, or far outside, becomes one that is outside.
  static MSDA_HOST_DEVICE int32_t to_index(acc_t down, int32_t size) {
    return static_cast<int32_t>(down >= -1 && down <= static_cast<acc_t>(size) ? down : acc_t(-3));
  }
};

enum class Method : int8_t { bilinear, nearest };

constexpr int32_t kOutside = -1;

// The four corners of a point, in the order nw, ne, sw, se.
template <typename acc_t>
struct Corners {
  int32_t pixel[4];  // in value's spatial dimension, or kOutside
  acc_t column_share[2], row_share[2];  // of west and east, north and south; outside: zero

  MSDA_HOST_DEVICE Corners()
      : pixel{kOutside, kOutside, kOutside, kOutside}, column_share{0, 0}, row_share{0, 0} {}

  MSDA_HOST_DEVICE Corners(acc_t location_x, acc_t location_y, const Level& level) {
    const Coordinate<acc_t> x(location_x, level.width), y(location_y, level.height);
    const bool west = x.is_inside(level.width), east = x.next_is_inside(level.width);
    const bool north = y.is_inside(level.height), south = y.next_is_inside(level.height);
    column_share[0] = west ? 1 - x.fraction : 0;
    column_share[1] = east ? x.fraction : 0;
    row_share[0] = north ? 1 - y.fraction : 0;
    row_share[1] = south ? y.fraction : 0;
    const int32_t nw = level.start + y.floor * level.width + x.floor;
    pixel[0] = north && west ? nw : kOutside;
    pixel[1] = north && east ? nw + 1 : kOutside;
    pixel[2] = south && west ? nw + level.width : kOutside;
    pixel[3] = south && east ? nw + level.width + 1 : kOutside;
  }

  // The first corner inside, or kOutside. All corners lie within a row and a pixel after it.
  MSDA_HOST_DEVICE int32_t first_pixel() const {
    for (int corner = 0; corner < 3; ++corner) {
      if (pixel[corner] != kOutside) return pixel[corner];
    }
    return pixel[3];
  }

  // A corner's part in the sample.
  MSDA_HOST_DEVICE acc_t share(int corner) const {
    return column_share[corner & 1] * row_share[corner >> 1];
  }

  // The sample and its derivatives by location (not by pixel), from the four corners' values, where
  // a corner outside has value zero.
  MSDA_HOST_DEVICE acc_t sample(const acc_t (&corner)[4]) const {
    return row_share[0] * (column_share[0] * corner[0] + column_share[1] * corner[1]) +
           row_share[1] * (column_share[0] * corner[2] + column_share[1] * corner[3]);
  }
  MSDA_HOST_DEVICE acc_t d_location_x(const acc_t (&corner)[4], const Level& level) const {
    return static_cast<acc_t>(level.width) *
           (row_share[0] * (corner[1] - corner[0]) + row_share[1] * (corner[3] - corner[2]));
  }
  MSDA_HOST_DEVICE acc_t d_location_y(const acc_t (&corner)[4], const Level& level) const {
    return static_cast<acc_t>(level.height) *
           (column_share[0] * (corner[2] - corner[0]) + column_share[1] * (corner[3] - corner[1]));
  }
};

}  // namespace ms_deform_attn
