// Raw speed of multiplying on AMX.

constexpr int64_t kPeakOperations = 4 * 16 * 16 * 32 * 2;

// tdpbf16ps alone, on four independent results.
uint64_t peak(int64_t rounds) {
  configure_tiles(kTileTokens);
  Stage stage = {};
  for (uint8_t& byte : stage.weights[0][0]) byte = uint8_t(rounds & 0x3f);
  publish();
  _tile_loadd(4, stage.weights[0][0], 64);
  _tile_loadd(5, stage.weights[0][0], 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(6, 4, 5);
    _tile_dpbf16ps(7, 4, 5);
  }
  _tile_stored(0, stage.results[0][0][0], 64);
  _tile_stored(7, stage.results[0][0][1], 64);
  publish();
  _tile_release();
  return uint64_t(stage.results[0][0][0][0][0]) + uint64_t(stage.results[0][0][1][0][0]);
}
