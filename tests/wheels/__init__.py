"""The wheel, built and used as a stranger would: `fresh.py` has the steps, `run.py` does them on every Python at hand.

`make wheels`, or `PYTHONPATH=tests python -m wheels.run 3.12`.
"""
