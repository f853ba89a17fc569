"""Programs made without sight of the diagnosis's rules: `python -m bench.diagnose.unseen`.

They were written from the list of faults alone, with bases, worlds and tasks of their own, and measured once, on
2026-11-29, before any rule was changed because of them. From then on they are no longer unseen. verify.py shows,
without the diagnosis, that each change takes effect.
"""
