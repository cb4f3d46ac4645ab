"""Reward functions in worker processes, and reward models."""
