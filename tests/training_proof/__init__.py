"""Hold recipes that name a published number against the authors' training code; `table.py` writes docs/training.md.

`published.py` says, for each recipe, what the authors' code does, in closed form: schedule, decay, crops, EMA and
first weights (`laws.py`, `crops.py`, `initial_weights.py`). `measured.py` gives what our recipe does. A new recipe is
found in the folder, and has a row; until `published.py` has an entry for it, its cells say "not compared".
"""
