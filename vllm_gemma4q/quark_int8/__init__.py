"""Gemma 4 in AMD Quark's W8A8 INT8: what writes it, and what vLLM needs to serve it.

`format.py` and `quantize.py` write checkpoints. `scheme.py` recognises the scheme in a `quantization_config`,
`facts.py` decides per module from a checkpoint's headers what is int8, `mend.py` turns other layouts into vLLM's;
`config.py`, `linear.py` and `moe.py` are what vLLM loads. Importing this package imports no engine.
"""
