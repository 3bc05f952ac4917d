"""`gemma4q report`: one HTML page of a quantized checkpoint. Facts are collected here, `render.py` draws them."""
