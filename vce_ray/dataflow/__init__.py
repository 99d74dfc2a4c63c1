"""Dataflow: rows, their schemas and ids, and Ray Data over plain steps (fanout.py)."""
