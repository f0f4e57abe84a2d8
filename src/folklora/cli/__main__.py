"""`python -m folklora.cli`."""

from folklora.cli import main

main()
