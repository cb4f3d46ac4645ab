"""From files of texts, comparisons and prompts to batches of token ids."""
