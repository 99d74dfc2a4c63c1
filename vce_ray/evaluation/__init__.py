"""Evaluation: a judge that looks at pictures, figures from what it saw, and a page that shows both. Knows no Ray."""
