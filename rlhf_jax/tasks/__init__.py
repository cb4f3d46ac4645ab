"""Embedded tasks: text, simulated preferences and true rewards."""
