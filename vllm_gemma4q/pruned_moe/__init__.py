"""Gemma 4 with experts pruned, any number of them in each layer."""
