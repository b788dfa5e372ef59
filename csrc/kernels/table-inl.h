// The table of a kernel file, from what differs between files: included last, inside the anonymous namespace.
//
// No include guard: it has no meaning outside those namespaces.

// Adds the kernels on these forms of activations (see work-inl.h), or those that stand in for them, to the facts. Function
// pointers are not compared here: with -fsanitize=undefined gcc takes no such comparison for a constant.
template <class Hidden, class Middle>
constexpr KernelTable with_kernels(KernelTable table,
                                   bool (*pack_fp32)(const float*, int, uint8_t*) = pack_rows<Hidden, float>,
                                   uint64_t (*gate_up_kernel)(const GateUpTask&) = gate_up<Hidden, Middle>,
                                   void (*down_kernel)(const DownTask&) = down<Middle>) {
  table.group_bytes = sizeof(Hidden);
  table.pack_fp32 = pack_fp32;
  table.pack_bf16 = pack_rows<Hidden, uint16_t>;
  table.gate_up = gate_up_kernel;
  table.down = down_kernel;
  table.read = read;
  table.peak = peak;
  if (table.max_tokens == 0) table.max_tokens = kMaxTokensPerCall;
  return table;
}
