"""Evals of a text and its model, whatever the SAE."""
