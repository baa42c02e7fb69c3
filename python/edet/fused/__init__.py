"""What turns layers into fused ops: descriptions, packed weights, recorded calls."""
