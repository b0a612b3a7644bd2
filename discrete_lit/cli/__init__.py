"""The `discrete-lit` command."""

from discrete_lit.cli.commands import main

__all__ = ["main"]
