"""`python -m solotune` is the `solotune` command.

Python puts the working directory first among the places where modules are looked for; a `torch.py` that lies there,
beside somebody's data, would be run in torch's place. So it is taken out before anything is imported.
"""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]
    from solotune.cli import main

    raise SystemExit(main())
