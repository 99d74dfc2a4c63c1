"""Concepts: what to erase, the words for it, and the catalogue that ships with the package."""
