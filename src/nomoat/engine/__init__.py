"""Packed weights, the walk forward and backward, adapters in memory, KV cache, sampling."""
