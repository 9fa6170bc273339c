"""A language model's activations, computed once and read many times.

A cache is a memo: activations at a hook are a function of the model and of a context's tokens, so a context that has been run once
is not run again, whoever asks: a training, another seed of it, an evaluation. SAELens' own cached activations (6.54) are not used:
Arrow has no bfloat16, its trainer of several SAEs reads none, and its store reads one hook, row after row in the order of the file,
without a permutation that follows the seed.
"""
