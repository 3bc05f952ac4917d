"""How much GPU memory a Gemma 4 needs to serve one request of T tokens: weights and KV cache of one rank, by engine.

There is no one number: it depends on the format, the engine and its version, the KV cache's type, the context, tensor
parallelism and the tokens in flight. What engines need beyond weights and cache (activations, CUDA graphs, workspace)
is never guessed: it is what a published table says, what the user measured, or "not measured".
"""
