"""Calibration: a model's own layers run over samples of text, one layer in memory, into one file of statistics."""
