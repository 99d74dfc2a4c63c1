"""Base models behind one small protocol (base.py)."""
