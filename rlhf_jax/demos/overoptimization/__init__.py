"""What pressing a reward model too hard does, measured and drawn."""
