"""Evaluation: draw images before and after, run detectors on them, compute metrics, write the report. Without Ray."""
