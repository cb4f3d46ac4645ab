"""Loading and saving Hugging Face directories: weights, adapters, the Hub."""
