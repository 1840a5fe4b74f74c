"""Commands: each parses its flags and delegates to fused_rec."""
