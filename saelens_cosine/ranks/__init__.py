"""One dictionary over several processes, each with a block of its features: `torchrun -m saelens_cosine train`."""
