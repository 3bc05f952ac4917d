"""Mend a quantized checkpoint with the one it was made from: what should not have been quantized comes back.

`names.py` finds the same tensor under different names, `formats.py` knows what three quantization configs mean,
`compare.py` compares bytes and weights, `plan.py` decides, `verify.py` checks what was written. No vLLM needed.
"""
