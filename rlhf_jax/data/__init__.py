"""Loads texts, comparisons and prompts from files and makes batches of token ids."""
