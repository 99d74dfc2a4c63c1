"""Training: objectives (one method per file) over shared loss terms, and one loop on Ray Train for all of them."""

HISTORY_FILE = "training.json"
"""File in a run's store with the metrics of every step: loss, gradient norm, and what the objective logs."""
