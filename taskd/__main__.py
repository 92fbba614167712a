"""`python -m taskd`: the same program as the console script."""

from taskd.cli.main import main

main()
