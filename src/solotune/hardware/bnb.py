"""bitsandbytes, imported without downloading code: `functional` and `optim` are its modules of those names.

On a CPU with AVX512-BF16, importing bitsandbytes calls `kernels.get_kernel`, which downloads native code from the hub
if the package `kernels` is installed. No variable switches that off, so `kernels` is hidden during the import here.
"""

from __future__ import annotations

import sys

_absent = "kernels" not in sys.modules
if _absent:
    sys.modules["kernels"] = None  # type: ignore[assignment] - an import of it then raises ImportError
try:
    from bitsandbytes import functional, optim
finally:
    if _absent:
        del sys.modules["kernels"]

__all__ = ["functional", "optim"]
