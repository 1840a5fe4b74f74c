"""The heterogeneous graph: on the host and as the model reads it, sparse sums, sampling and removal of edges."""
