"""`python -m discrete_lit` is `discrete-lit`."""

from discrete_lit.cli import main

main()
