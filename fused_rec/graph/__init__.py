"""A `Dataset`'s observed part to a typed graph, and the one sparse sum over it."""
