"""Commands that do not train: generate, evaluate, inspect, and others."""
