"""Bounded reading of files that other people wrote."""
