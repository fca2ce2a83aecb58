"""Readers of `.pte` and `.ptd` files: no GPU, no torch."""
