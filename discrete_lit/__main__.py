"""`python -m discrete_lit` is `discrete-lit`."""

from discrete_lit.cli.commands import main

main()
