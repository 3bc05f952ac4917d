"""EXL3, ExLlamaV3's trellis format: what writes Gemma 4 in it, and what vLLM needs to serve it packed.

Serving: `scheme.py` recognises a `quantization_config`, `facts.py` decides per linear from a checkpoint's headers,
`mend.py` turns old layouts into the one that is loaded, `shards.py` lays a rank's parts into flat parameters,
`experts.py` runs experts; `config.py`, `linear.py`, `lm_head.py` and `moe.py` are what vLLM loads.

Importing this package imports neither torch nor vLLM.
"""
