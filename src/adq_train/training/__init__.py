"""Training: the loop, the schedules, evaluation and checkpoints."""
