"""The command line.

`solotune.cli.main` is the function that the console script calls; the module of that name is reached by
`from solotune.cli.main import ...`.
"""

from solotune.cli.main import main

__all__ = ["main"]
