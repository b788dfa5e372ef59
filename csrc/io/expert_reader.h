// One expert from the files of a checkpoint into its final place, a few rows at a time: memory holds the expert once.
#pragma once
#include <cstdint>
#include <string>

#include "io/shard_file.h"
#include "moe/expert_layer.h"

namespace k2 {

// Where one tensor lies. The file is open and is not closed meanwhile.
struct StoredTensor {
  std::string name;
  std::string path;  // for messages
  int fd;
  int64_t offset;
  int64_t bytes;
};

struct StoredMatrix {
  StoredTensor words;   // int32 [rows, inputs / 8]
  StoredTensor scales;  // bf16 [rows, inputs / 32]
};

struct StoredExpert {
  StoredMatrix gate, up, down;
};

// Reads, packs and checksums the expert on the calling thread, with up to 9 MB of scratch memory that the thread keeps.
// Thread-safe for different experts. ArgumentError for sizes that do not fit the layer; WeightError, naming tensor and
// file, for bytes that cannot be read or scales that cannot be computed with: the expert is not loaded then.
void read_expert(const StoredExpert& stored, ReadMode mode, ExpertLayer& layer, int expert);

}  // namespace k2
