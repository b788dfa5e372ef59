// What the CPU and the operating system allow: CPUID leaves and XCR0, turned into named features.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace k2 {

enum Feature : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kAvx512F = 1u << 2,
  kAvx512Bw = 1u << 3,
  kAvx512Vl = 1u << 4,
  kAvx512Vnni = 1u << 5,
  kAvx512Bf16 = 1u << 6,
  kAmxTile = 1u << 7,
  kAmxBf16 = 1u << 8,
  kAmxPermitted = 1u << 9,  // unset where the CPU has tiles and the system refuses them to this process
};

// The registers that decide, as one CPU reported them; tests fill it from recorded dumps of other machines.
struct CpuidDump {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_ecx = 0;
  uint32_t leaf7_edx = 0;
  uint32_t leaf7_1_eax = 0;  // subleaf 1
  uint64_t xcr0 = 0;  // 0 where the operating system has not enabled XSAVE
};

// The dump of this machine; all zero on another architecture.
CpuidDump read_cpuid();

// Features whose instructions exist and whose registers the operating system saves.
uint32_t features_of(const CpuidDump& dump);

// `features` with kAmxPermitted, which is asked for only where there are tiles: Linux gives them to a process on request,
// and refuses if a thread's signal stack is too small for the larger register file.
uint32_t with_permission(uint32_t features, bool (*request)());
bool request_amx_permission();

// The features of this machine, asked once.
uint32_t machine_features();

// Names of the set bits, as in /proc/cpuinfo.
std::vector<std::string> feature_names(uint32_t features);

}  // namespace k2
