"""Builds two small trained Gemma 4 checkpoints, `dense` and `moe`, from files in this folder; see README.md."""
