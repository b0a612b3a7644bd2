"""The parts of `benchmarks/gpu.py`: what is checked and what is timed on a GPU, each a function that yields rows.

`part.py` says what a part is. Every module of this package registers its parts where it is imported, in the order in
which they run within their kind: `right.py` and `right_*.py` check that the results are right there, `fast_*.py` that
they come fast. A part is run in a process of its own, with a time limit; nothing of it is shared with the next but the
machine's figures, which are measured once.
"""
