"""`gemma4q doctor`: will an engine load a checkpoint, and what would it silently do wrong? From headers alone."""
