"""Evals of one SAE."""
