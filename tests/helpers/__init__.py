"""What several tests share. `tests/` is on the path of every test, as its conftest.py lies there."""
