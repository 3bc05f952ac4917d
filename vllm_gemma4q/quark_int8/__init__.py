"""Gemma 4 in Quark's W8A8 INT8: what vLLM needs to serve it, and what writes it.

`scheme.py` recognises the scheme in a `quantization_config`; `facts.py` reads a checkpoint's headers and
decides per module what is int8; `config.py`, `linear.py`, `moe.py` and `model.py` are what vLLM loads.
Importing this package imports no engine.
"""
