"""A run on this machine: its directory, devices, checkpoints, log and report."""
