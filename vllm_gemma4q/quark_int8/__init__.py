"""AMD Quark's W8A8 INT8: int8 weights with one scale a row, activations quantized per token while serving."""
