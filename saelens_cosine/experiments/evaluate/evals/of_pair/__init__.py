"""Evals of an SAE against the one that it is compared with."""
