"""`python -m solotune` is the `solotune` command."""

from solotune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
