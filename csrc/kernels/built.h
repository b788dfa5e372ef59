// K2_<ISA>(table): the address of a table in the namespace of an instruction set, null where this build leaves its files
// out. setup.py defines K2_BUILT_<ISA> for those that are part of it.
#pragma once

#if defined(K2_BUILT_AMX_BF16)
#define K2_AMX_BF16(table) &amx_bf16::table
#else
#define K2_AMX_BF16(table) nullptr
#endif

#if defined(K2_BUILT_AVX512_BF16)
#define K2_AVX512_BF16(table) &avx512_bf16::table
#else
#define K2_AVX512_BF16(table) nullptr
#endif

#if defined(K2_BUILT_AVX512_VNNI)
#define K2_AVX512_VNNI(table) &avx512_vnni::table
#else
#define K2_AVX512_VNNI(table) nullptr
#endif

#if defined(K2_BUILT_AVX2)
#define K2_AVX2(table) &avx2::table
#else
#define K2_AVX2(table) nullptr
#endif
