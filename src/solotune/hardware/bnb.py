"""bitsandbytes, imported without downloading code: `functional` and `optim` are its modules of those names.

On a CPU with AVX512-BF16, importing bitsandbytes calls `kernels.get_kernel`, which downloads native code from the hub
if the package `kernels` is installed. No variable switches that off, so `kernels` is hidden during the import here,
also where transformers has imported it before.
"""

from __future__ import annotations

import sys

_kernels = {name: module for name, module in sys.modules.items() if name == "kernels"}  # transformers may have it
sys.modules["kernels"] = None  # type: ignore[assignment] - an import of it then raises ImportError
try:
    from bitsandbytes import functional, optim
finally:
    sys.modules.pop("kernels", None)
    sys.modules.update(_kernels)

__all__ = ["functional", "optim"]
