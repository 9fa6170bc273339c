"""Causal diagnostics: what edits of activations do to a model's next-token predictions.

All start from one `forward.clean_run` of a model over contexts and take tokens of it, `run.sample()` or `run.sample().without_sinks()`.
"""
