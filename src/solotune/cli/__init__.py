"""The command line.

`solotune.cli.main` is the function that the console script calls; import from the module of the same name with
`from solotune.cli.main import ...`.
"""

import os
import sys

from solotune.runtime import rank_processes

if sys.argv[1:2] == ["train"]:
    rank_processes.begin(os.environ)  # before the other imports: a rank may be killed meanwhile

from solotune.cli.main import main

__all__ = ["main"]
