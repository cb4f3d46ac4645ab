"""Reading and writing Hugging Face directories: weights, adapters, the Hub."""
