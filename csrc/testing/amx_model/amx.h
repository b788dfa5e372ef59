// A scalar model of the AMX tile instructions that the kernels use, for tests on CPUs without them.
//
// The model's `<immintrin.h>` (csrc/testing/avx512_model) includes it, so that a kernel file is compiled against it
// unchanged. Each function does what Intel's manual (volume 2, LDTILECFG to TILEZERO) says, and throws where the
// processor would fault: #GP for a bad configuration, #UD for tiles that do not fit. Registers and configuration
// belong to the thread, as they do in the processor.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace amx_model {

constexpr int kTiles = 8;      // palette 1
constexpr int kMaxRows = 16;   // of a tile
constexpr int kRowBytes = 64;  // of a row

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void fault_unless(bool condition, const char* vector, const std::string& why) {
  if (!condition) throw Fault(std::string(vector) + ": " + why);
}

struct Shape {
  int rows = 0;
  int colsb = 0;  // bytes per row
};

struct State {
  bool configured = false;
  Shape shape[kTiles];
  uint8_t data[kTiles][kMaxRows][kRowBytes] = {};
};

inline State& state() {
  static thread_local State current;
  return current;
}

// The tile's shape; #UD without a configuration, or for a tile that the configuration leaves out.
inline Shape shape_of(int tile) {
  fault_unless(tile >= 0 && tile < kTiles, "#UD", "no such tile");
  fault_unless(state().configured, "#UD", "tiles are not configured");
  const Shape shape = state().shape[tile];
  fault_unless(shape.rows != 0 && shape.colsb != 0, "#UD", "tile " + std::to_string(tile) + " is not in use");
  return shape;
}

// DAZ and FTZ: a denormal is a zero of the same sign.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// A bf16 is the upper half of an fp32.
inline float element(const uint8_t* row, int index) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * index, sizeof(bits));
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return flushed(x);
}

inline float fused(float a, float b, float c) { return flushed(std::fma(a, b, c)); }

}  // namespace amx_model

// LDTILECFG. Byte 0 is the palette, byte 1 the row to start at, 16..31 the tiles' bytes per row, 48..55 their rows; the
// others are reserved. Zeroes every tile.
inline void _tile_loadconfig(const void* memory) {
  using namespace amx_model;
  uint8_t config[64];
  std::memcpy(config, memory, sizeof(config));
  State next;
  fault_unless(config[0] <= 1, "#GP", "palette " + std::to_string(config[0]));
  if (config[0] == 1) {
    fault_unless(config[1] == 0, "#GP", "start_row is only for interrupted instructions");
    for (int i = 2; i < 16; ++i) fault_unless(config[i] == 0, "#GP", "reserved byte " + std::to_string(i));
    for (int i = 32; i < 48; ++i) fault_unless(config[i] == 0, "#GP", "reserved byte " + std::to_string(i));
    for (int i = 56; i < 64; ++i) fault_unless(config[i] == 0, "#GP", "reserved byte " + std::to_string(i));
    for (int t = 0; t < kTiles; ++t) {
      const Shape shape{config[48 + t], config[16 + 2 * t] + 256 * config[17 + 2 * t]};
      fault_unless(shape.rows <= kMaxRows, "#GP", "rows of tile " + std::to_string(t));
      fault_unless(shape.colsb <= kRowBytes, "#GP", "bytes per row of tile " + std::to_string(t));
      fault_unless((shape.rows == 0) == (shape.colsb == 0), "#GP", "half of tile " + std::to_string(t) + " is zero");
      next.shape[t] = shape;
    }
    next.configured = true;
  }
  state() = next;
}

// TILERELEASE: back to the initial state.
inline void _tile_release() { amx_model::state() = amx_model::State(); }

// TILEZERO.
inline void _tile_zero(int tile) {
  amx_model::shape_of(tile);
  std::memset(amx_model::state().data[tile], 0, sizeof(amx_model::state().data[tile]));
}

// TILELOADD: rows from `base`, `stride` bytes apart; what the shape leaves of the register becomes zero.
inline void _tile_loadd(int tile, const void* base, size_t stride) {
  const amx_model::Shape shape = amx_model::shape_of(tile);
  auto& data = amx_model::state().data[tile];
  std::memset(data, 0, sizeof(data));
  for (int r = 0; r < shape.rows; ++r) {
    std::memcpy(data[r], static_cast<const uint8_t*>(base) + ptrdiff_t(r) * ptrdiff_t(stride), size_t(shape.colsb));
  }
}

// TILESTORED.
inline void _tile_stored(int tile, void* base, size_t stride) {
  const amx_model::Shape shape = amx_model::shape_of(tile);
  for (int r = 0; r < shape.rows; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + ptrdiff_t(r) * ptrdiff_t(stride), amx_model::state().data[tile][r],
                size_t(shape.colsb));
  }
}

// TDPBF16PS: c[m][n] += sum over k of a[m][k] * b[k][n]. Even and odd elements have a chain of fused multiply-adds each,
// both from zero; their sum is added to c. Rounding is to nearest even and denormals count as zero, whatever MXCSR says.
inline void _tile_dpbf16ps(int c, int a, int b) {
  using namespace amx_model;
  const Shape sc = shape_of(c), sa = shape_of(a), sb = shape_of(b);
  fault_unless(c != a && c != b && a != b, "#UD", "tiles must differ");
  fault_unless(sc.colsb % 4 == 0 && sa.colsb % 4 == 0 && sb.colsb % 4 == 0, "#UD", "bytes per row must be pairs");
  fault_unless(sc.rows == sa.rows, "#UD", "rows of c and a");
  fault_unless(sc.colsb == sb.colsb, "#UD", "columns of c and b");
  fault_unless(sa.colsb / 4 == sb.rows, "#UD", "pairs of a and rows of b");
  State& s = state();
  for (int m = 0; m < sc.rows; ++m) {
    for (int n = 0; n < sc.colsb / 4; ++n) {
      float chain[2] = {};
      for (int k = 0; k < sa.colsb / 4; ++k) {
        for (int odd = 0; odd < 2; ++odd) {
          chain[odd] = fused(element(s.data[a][m], 2 * k + odd), element(s.data[b][k], 2 * n + odd), chain[odd]);
        }
      }
      float sum;
      std::memcpy(&sum, s.data[c][m] + 4 * n, sizeof(sum));
      sum = flushed(flushed(sum) + flushed(chain[0] + chain[1]));
      std::memcpy(s.data[c][m] + 4 * n, &sum, sizeof(sum));
    }
    std::memset(s.data[c][m] + sc.colsb, 0, size_t(kRowBytes - sc.colsb));
  }
  for (int m = sc.rows; m < kMaxRows; ++m) std::memset(s.data[c][m], 0, kRowBytes);
}
