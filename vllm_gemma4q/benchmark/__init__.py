"""Times of INT8 linears on the machine at hand: what `gemma4q bench` and `gemma4q tune` do.

    shapes.py      sizes of Gemma 4's linears        timing.py      seconds a call: graphs on GPUs, loops on CPUs
    contenders.py  who multiplies                    linear.py      contenders x shapes x M -> rows
    candidates.py  tiles worth timing                compiled.py    which of them spill or do not fit
    search.py      times -> rows of a table (pure)   tune.py        times the tiles, makes the tables

Not done here: end-to-end speed of an engine, FP8, quality.
"""
