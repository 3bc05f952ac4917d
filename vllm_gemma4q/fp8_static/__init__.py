"""FP8 (E4M3) weights and activations with static scales: written by `quantize.py`, served by the rest.

Importing this package imports neither torch nor vLLM.
"""
