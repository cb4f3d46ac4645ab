"""A file per command that trains nothing: generate, evaluate, inspect, and others."""
