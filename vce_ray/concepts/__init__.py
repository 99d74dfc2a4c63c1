"""Concepts to erase: their words and prompts, and the catalogue that ships with the package."""
