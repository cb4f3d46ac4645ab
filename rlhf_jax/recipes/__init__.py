"""One file per stage, each with its loop from top to bottom."""
