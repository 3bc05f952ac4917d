"""One module a command of `gguf-mixed`: arguments in, text or JSON out; the library does the work."""
