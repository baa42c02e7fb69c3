"""Networks: backbone, BiFPN, heads, the whole detector, and its checkpoints."""
