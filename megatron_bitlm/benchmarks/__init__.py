"""Timings of the parts, each against what it replaces."""
