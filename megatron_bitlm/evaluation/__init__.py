"""Likelihood, baselines and pictures."""
