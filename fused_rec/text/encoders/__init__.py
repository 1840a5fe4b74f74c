"""Pretrained encoder families in Flax: config, layers, pooling, weights, adapters."""
