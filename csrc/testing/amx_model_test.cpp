// The model of the tile instructions: the rules of the manual one by one, and the arithmetic against double.
#include "testing/amx_model/amx.h"

#include <bit>
#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "testing/check.h"

namespace {

using Random = std::mt19937_64;

struct Config {
  uint8_t bytes[64] = {1};

  Config& tile(int t, int rows, int colsb) {
    bytes[16 + 2 * t] = uint8_t(colsb);
    bytes[17 + 2 * t] = uint8_t(colsb >> 8);
    bytes[48 + t] = uint8_t(rows);
    return *this;
  }
  Config& byte(int i, int value) {
    bytes[i] = uint8_t(value);
    return *this;
  }
  void load() const { _tile_loadconfig(bytes); }
};

void expect_fault(const char* vector, const std::function<void()>& run) {
  try {
    run();
  } catch (const amx_model::Fault& fault) {
    K2_EXPECT(std::string(fault.what()).starts_with(vector));
    return;
  }
  K2_EXPECT(!"a fault");
}

void bad_configurations_fault() {
  expect_fault("#GP", [] { Config().byte(0, 2).load(); });
  expect_fault("#GP", [] { Config().tile(0, 17, 64).load(); });
  expect_fault("#GP", [] { Config().tile(7, 16, 65).load(); });
  expect_fault("#GP", [] { Config().tile(3, 16, 256 + 64).load(); });
  expect_fault("#GP", [] { Config().tile(3, 16, 0).load(); });
  expect_fault("#GP", [] { Config().tile(3, 0, 64).load(); });
  for (const int reserved : {2, 15, 32, 47, 56, 63}) {
    expect_fault("#GP", [=] { Config().tile(0, 16, 64).byte(reserved, 1).load(); });
  }
  Config().tile(0, 16, 64).tile(7, 1, 4).load();  // a good one, with tiles left out
}

void tiles_that_do_not_fit_fault() {
  float memory[256] = {};
  _tile_release();
  expect_fault("#UD", [&] { _tile_zero(0); });
  expect_fault("#UD", [&] { _tile_loadd(0, memory, 64); });
  expect_fault("#UD", [&] { _tile_stored(0, memory, 64); });
  const auto dot = [](Config config, int c = 0, int a = 1, int b = 2) {
    return [=] {
      config.load();
      _tile_dpbf16ps(c, a, b);
    };
  };
  Config good;
  good.tile(0, 5, 64).tile(1, 5, 24).tile(2, 6, 64);
  dot(good)();
  expect_fault("#UD", dot(good, 0, 1, 3));  // left out
  expect_fault("#UD", dot(good, 0, 0, 2));
  expect_fault("#UD", dot(good, 0, 2, 2));
  expect_fault("#UD", dot(good, 0, 1, 8));
  expect_fault("#UD", dot(Config(good).tile(1, 4, 24)));  // rows of c and a
  expect_fault("#UD", dot(Config(good).tile(1, 5, 28)));  // pairs of a and rows of b
  expect_fault("#UD", dot(Config(good).tile(2, 6, 60)));  // columns of c and b
  expect_fault("#UD", dot(Config(good).tile(1, 5, 26)));  // no whole pairs
}

void loads_and_stores_move_what_the_shape_says() {
  Random random(std::random_device{}());
  uint8_t memory[16 * 80], back[16 * 80];
  for (uint8_t& byte : memory) byte = uint8_t(random());
  Config().tile(4, 7, 12).load();
  _tile_loadd(4, memory, 80);
  std::memset(back, 0xee, sizeof(back));
  _tile_stored(4, back, 80);
  for (int r = 0; r < 16; ++r) {
    for (int i = 0; i < 80; ++i) {
      K2_EXPECT(back[80 * r + i] == (r < 7 && i < 12 ? memory[80 * r + i] : 0xee));
      if (i < 64 && (r >= 7 || i >= 12)) K2_EXPECT(amx_model::state().data[4][r][i] == 0);
    }
  }
  std::thread([] { expect_fault("#UD", [] { _tile_zero(4); }); }).join();  // another thread has its own tiles
  Config().tile(4, 7, 12).load();
  K2_EXPECT(amx_model::state().data[4][0][0] == 0);  // a new configuration zeroes them
  _tile_loadd(4, memory, 80);
  _tile_zero(4);
  K2_EXPECT(amx_model::state().data[4][6][11] == 0);
}

uint16_t bf16(float x) { return uint16_t(std::bit_cast<uint32_t>(x) >> 16); }

// One product of a row of pairs with a column of pairs, added to `start`.
float dot(const std::vector<float>& a, const std::vector<float>& b, float start) {
  const int pairs = int(a.size()) / 2;
  uint16_t row[32], column[32];
  for (int i = 0; i < 2 * pairs; ++i) row[i] = bf16(a[size_t(i)]), column[i] = bf16(b[size_t(i)]);
  Config().tile(0, 1, 4).tile(1, 1, 4 * pairs).tile(2, pairs, 4).load();
  _tile_loadd(0, &start, 4);
  _tile_loadd(1, row, 64);
  _tile_loadd(2, column, 4);
  _tile_dpbf16ps(0, 1, 2);
  float result;
  _tile_stored(0, &result, 4);
  return result;
}

bool same(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

void the_order_of_roundings_is_the_manuals() {
  const float big = 0x1p24f, tiny = 0x1p-70f, least = 0x1p-126f;
  // Even and odd chains are apart: 2^24 absorbs a 1 of its own chain only, and the chains start from zero, not from c.
  K2_EXPECT(same(dot({big, 0, 1, 0}, {1, 1, 1, 1}, 0), big));
  K2_EXPECT(same(dot({big, 1, 0, 1}, {1, 1, 1, 1}, 0), big + 2));
  K2_EXPECT(same(dot({1, 0, 1, 0}, {1, 1, 1, 1}, big), big + 2));
  // Ties go to even: 2^24 + 1 is halfway, 2^24 + 3 rounds up.
  K2_EXPECT(same(dot({1, 0}, {1, 0}, big), big));
  K2_EXPECT(same(dot({1, 0}, {1, 0}, big + 2), big + 4));
  // A product is not rounded before it is added.
  K2_EXPECT(same(dot({1.0078125f, 0, -1, 0}, {1.0078125f, 0, 1.015625f, 0}, 0), 0x1p-14f));
  // Denormals: inputs, results and c.
  K2_EXPECT(same(dot({tiny, 0}, {tiny, 0}, 0), 0));
  K2_EXPECT(same(dot({-tiny, 0}, {tiny, 0}, -0.0f), 0));
  K2_EXPECT(same(dot({least / 2, 0}, {2, 0}, 0), 0));
  K2_EXPECT(same(dot({0, 0}, {0, 0}, least / 2), 0));
  K2_EXPECT(same(dot({least, 0}, {1, 0}, 0), least));
  K2_EXPECT(same(dot({least, 0}, {1, 0}, -1.5f * least), -0.0f));
  const float infinity = HUGE_VALF;
  K2_EXPECT(same(dot({infinity, 1}, {1, 1}, 0), infinity));
  K2_EXPECT(std::isnan(dot({infinity, -infinity}, {1, 1}, 0)));
}

void random_products_are_close_to_double() {
  Random random(std::random_device{}());
  std::normal_distribution<float> normal;
  for (int round = 0; round < 300; ++round) {
    const int rows = 1 + int(random() % 16), pairs = 1 + int(random() % 16), columns = 1 + int(random() % 16);
    uint16_t a[16][32], b[16][32];
    float c[16][16], out[16][16];
    for (auto& row : a) {
      for (uint16_t& x : row) x = bf16(normal(random));
    }
    for (auto& row : b) {
      for (uint16_t& x : row) x = bf16(normal(random));
    }
    for (auto& row : c) {
      for (float& x : row) x = normal(random);
    }
    Config().tile(5, rows, 4 * columns).tile(6, rows, 4 * pairs).tile(7, pairs, 4 * columns).load();
    _tile_loadd(5, c, 64);
    _tile_loadd(6, a, 64);
    _tile_loadd(7, b, 64);
    _tile_dpbf16ps(5, 6, 7);
    _tile_stored(5, out, 64);
    const auto value = [](uint16_t bits) { return double(std::bit_cast<float>(uint32_t(bits) << 16)); };
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < columns; ++n) {
        double sum = c[m][n], size = std::abs(sum);
        for (int k = 0; k < 2 * pairs; ++k) {
          const double product = value(a[m][k]) * value(b[k / 2][2 * n + k % 2]);
          sum += product;
          size += std::abs(product);
        }
        K2_EXPECT(std::abs(out[m][n] - sum) <= 19 * 0x1p-24 * size);  // 16 steps of a chain, two sums, one spare
      }
    }
  }
}

}  // namespace

int main() {
  bad_configurations_fault();
  tiles_that_do_not_fit_fault();
  loads_and_stores_move_what_the_shape_says();
  the_order_of_roundings_is_the_manuals();
  random_products_are_close_to_double();
  std::puts("ok");
}
