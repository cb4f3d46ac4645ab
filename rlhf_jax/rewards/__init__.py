"""Calling reward functions in processes of their own, and reward models."""
