// The table of a kernel file, from what differs between files: included last, inside the anonymous namespace.
//
// No include guard: it has no meaning outside those namespaces.

// Fills in the kernels on these forms of activations (see work-inl.h) where the facts name none of their own.
template <class Hidden, class Middle>
constexpr KernelTable with_kernels(KernelTable table) {
  table.layout_id = kLayoutL32;
  table.group_bytes = sizeof(Hidden);
  table.pack_bf16 = pack_rows<Hidden, uint16_t>;
  table.read = read;
  table.peak = peak;
  if (!table.max_tokens) table.max_tokens = kMaxTokensPerCall;
  if (!table.pack_fp32) table.pack_fp32 = pack_rows<Hidden, float>;
  if (!table.gate_up) table.gate_up = gate_up<Hidden, Middle>;
  if (!table.down) table.down = down<Middle>;
  return table;
}
