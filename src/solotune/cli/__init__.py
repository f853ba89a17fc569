"""The command line.

`solotune.cli.main` is the function that the console script calls; import from the module of the same name with
`from solotune.cli.main import ...`.
"""

from solotune.cli.main import main

__all__ = ["main"]
