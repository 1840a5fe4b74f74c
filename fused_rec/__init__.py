"""Text-and-graph recommendation of financial products in JAX."""
