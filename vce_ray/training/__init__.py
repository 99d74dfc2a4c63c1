"""Training: the loss and the step in plain torch, and Ray Train over them (train.py)."""
