// Errors that reach Python: bindings.cpp maps each class to one exception.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace k2 {

// A wrong argument: ValueError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Weights that cannot be computed with: hybrid_k2.errors.CheckpointError.
struct WeightError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The engine cannot go on: hybrid_k2.errors.EngineError.
struct EngineError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that cannot be had: MemoryError.
struct MemoryError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws ArgumentError "subject: expected <expected>, got <got>" unless `ok`.
template <class Got>
void check_argument(bool ok, const char* subject, const std::string& expected, const Got& got) {
  if (!ok) throw ArgumentError(text(subject, ": expected ", expected, ", got ", got));
}

}  // namespace k2
