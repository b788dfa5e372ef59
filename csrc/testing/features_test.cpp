// The permission for AMX: asked for only where there are tiles, and a refusal is seen.
#include "cpu/features.h"

#include <cstdio>

#include "testing/check.h"

namespace k2 {
namespace {

int requests = 0;
bool grant() { return ++requests; }
bool refuse() { return ++requests == 0; }

void permission_is_asked_for_where_there_are_tiles() {
  K2_EXPECT(with_permission(kAvx2, refuse) == (kAvx2 | kAmxPermitted));
  K2_EXPECT(requests == 0);
  K2_EXPECT(with_permission(kAmxTile | kAmxBf16, grant) == (kAmxTile | kAmxBf16 | kAmxPermitted));
  K2_EXPECT(requests == 1);
  K2_EXPECT(with_permission(kAmxTile | kAmxBf16, refuse) == (kAmxTile | kAmxBf16));
  K2_EXPECT(requests == 2);
}

void this_machine_has_what_its_registers_say() {
  const uint32_t features = machine_features();
  K2_EXPECT((features & ~kAmxPermitted) == features_of(read_cpuid()));
  if (!(features & kAmxTile)) K2_EXPECT(features & kAmxPermitted);
}

}  // namespace
}  // namespace k2

int main() {
  k2::permission_is_asked_for_where_there_are_tiles();
  k2::this_machine_has_what_its_registers_say();
  std::puts("ok");
}
