"""The base models, behind one small protocol (base.py)."""
