"""Measures and plots reward model overoptimization."""
