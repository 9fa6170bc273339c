"""What is asked: each experiment with its settings, its run, its results and its command."""
