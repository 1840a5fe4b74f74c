"""The heterogeneous graph of observed data, its adjacencies and sparse sums, and neighbor sampling."""
