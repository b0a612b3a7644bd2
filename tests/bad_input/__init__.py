"""Craft files and command lines of every kind that was found to go wrong, and judge what the project makes of each.

`case.py` says what a case is and what is accepted of it. `archives.py`, `pictures.py`, `arrays.py`, `weights.py` and
`settings.py` hold the cases of one kind each. `run.py` judges all of them, each in a process of its own with a limit of
time and memory: `make bad-input`, or `PYTHONPATH=.:tests python -m bad_input.run [PART OF A NAME ...]`.
"""
