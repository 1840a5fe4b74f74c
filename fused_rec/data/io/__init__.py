"""Files and columns to checked tables, and back."""
