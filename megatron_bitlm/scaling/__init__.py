"""Scaling laws: runs planned over sizes and budgets, gathered, and fitted."""
