"""What a quantized checkpoint is worth, measured on the engine that serves it."""
