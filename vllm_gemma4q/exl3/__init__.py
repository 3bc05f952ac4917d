"""EXL3, ExLlamaV3's trellis format: what writes Gemma 4 in it, and what vLLM needs to serve it packed.

Importing this package imports neither torch nor vLLM.
"""
