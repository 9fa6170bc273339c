"""From text to activations: which documents are held out, how they become contexts, which tokens are measured."""
