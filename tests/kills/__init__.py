"""Kill runs at random points, go on on other numbers of ranks, and compare every batch with what it should have been.

`run.py` starts `discrete-lit` commands, kills them and judges what is left; `ledger.py` is the callback in each rank
that notes what was trained on, and where the run is: `make kills`, or
`PYTHONPATH=.:tests python -m kills.run --kills 30 --seed 0`.
"""
