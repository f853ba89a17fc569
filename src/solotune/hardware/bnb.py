"""bitsandbytes, imported without what it would fetch: `functional` and `optim` are its modules of those names.

On a CPU with AVX512-BF16 importing it calls `kernels.get_kernel`, which downloads native code from the hub, wherever
the package `kernels` is installed; no variable switches that off. While it is imported here, that package is not found.
"""

from __future__ import annotations

import sys

_absent = "kernels" not in sys.modules
if _absent:
    sys.modules["kernels"] = None  # type: ignore[assignment] - Python's own way to say: not to be imported
try:
    from bitsandbytes import functional, optim
finally:
    if _absent:
        del sys.modules["kernels"]

__all__ = ["functional", "optim"]
