"""One module a command of `gemma4q`: arguments in, text or JSON out; the library does the work."""
