"""Files to a `Dataset`, and a `Dataset` to what training may see. On the host, with Arrow and NumPy."""
