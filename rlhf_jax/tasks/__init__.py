"""Embedded tasks: their text, their simulated preferences and their true reward."""
