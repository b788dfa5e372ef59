#include "cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace k2 {
namespace {

struct FeatureName {
  Feature feature;
  const char* name;
};

constexpr FeatureName kNames[] = {
    {kAvx2, "avx2"},
    {kFma, "fma"},
    {kAvx512F, "avx512f"},
    {kAvx512Bw, "avx512bw"},
    {kAvx512Vl, "avx512vl"},
    {kAvx512Vnni, "avx512_vnni"},
    {kAvx512Bf16, "avx512_bf16"},
    {kAmxTile, "amx_tile"},
    {kAmxBf16, "amx_bf16"},
    {kAmxPermitted, "the system's permission for AMX"},
};

constexpr bool bit(uint32_t value, int index) { return (value >> index) & 1; }

constexpr uint64_t kXcr0Avx = 0x06;     // SSE and AVX state
constexpr uint64_t kXcr0Avx512 = 0xe6;  // and opmask, upper halves, upper registers
constexpr uint64_t kXcr0Amx = 0x60006;  // and tile configuration, tile data

}  // namespace

CpuidDump read_cpuid() {
  CpuidDump dump;
#if defined(__x86_64__)
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return dump;
  dump.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    dump.leaf7_ebx = ebx;
    dump.leaf7_ecx = ecx;
    dump.leaf7_edx = edx;
    const uint32_t last_subleaf = eax;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) dump.leaf7_1_eax = eax;
  }
  if (bit(dump.leaf1_ecx, 27)) {  // OSXSAVE: xgetbv may be executed
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    dump.xcr0 = (uint64_t(high) << 32) | low;
  }
#endif
  return dump;
}

uint32_t features_of(const CpuidDump& dump) {
  uint32_t features = 0;
  if ((dump.xcr0 & kXcr0Avx) == kXcr0Avx) {
    if (bit(dump.leaf7_ebx, 5)) features |= kAvx2;
    if (bit(dump.leaf1_ecx, 12)) features |= kFma;
  }
  if ((dump.xcr0 & kXcr0Avx512) == kXcr0Avx512) {
    if (bit(dump.leaf7_ebx, 16)) features |= kAvx512F;
    if (bit(dump.leaf7_ebx, 30)) features |= kAvx512Bw;
    if (bit(dump.leaf7_ebx, 31)) features |= kAvx512Vl;
    if (bit(dump.leaf7_ecx, 11)) features |= kAvx512Vnni;
    if (bit(dump.leaf7_1_eax, 5)) features |= kAvx512Bf16;
  }
  if ((dump.xcr0 & kXcr0Amx) == kXcr0Amx) {
    if (bit(dump.leaf7_edx, 24)) features |= kAmxTile;
    if (bit(dump.leaf7_edx, 22)) features |= kAmxBf16;
  }
  return features;
}

uint32_t with_permission(uint32_t features, bool (*request)()) {
  const bool refused = (features & kAmxTile) && !request();
  return refused ? features : features | kAmxPermitted;
}

bool request_amx_permission() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM: for all threads of the process
  constexpr long kTileData = 18;     // bit of XCR0
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t machine_features() {
  static const uint32_t features = with_permission(features_of(read_cpuid()), request_amx_permission);
  return features;
}

std::vector<std::string> feature_names(uint32_t features) {
  std::vector<std::string> names;
  for (const FeatureName& entry : kNames) {
    if (features & entry.feature) names.emplace_back(entry.name);
  }
  return names;
}

}  // namespace k2
