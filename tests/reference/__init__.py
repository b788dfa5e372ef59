"""Oracles: the model's mathematics written plainly, in float64, without cache, blocks or batches."""
