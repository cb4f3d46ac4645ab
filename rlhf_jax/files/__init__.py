"""Files, read within limits and written atomically."""
