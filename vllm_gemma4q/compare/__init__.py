"""Checkpoints and GGUF files of one base beside each other: sizes from headers, quality from result files only.

model.py       one of them: identity, scheme, bytes, parameters, memory
outline.py     the shapes that files of one base share, read from config.json or a GGUF's metadata
provenance.py  what manifests and sidecars say of the files that each was made from
results.py     result files of all kinds, read into one form
figures.py     figures matched to models by digest, and set apart by how they were measured
plot.py        the picture; labels.py places its labels
"""
