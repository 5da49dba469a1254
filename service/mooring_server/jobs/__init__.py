"""Jobs and what they work on: photo intake, and the runner that drives training and evaluation."""
