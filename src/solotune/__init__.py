"""Fine-tune an LLM on one GPU, and see what was learned.

    import solotune

    result = solotune.train("run.yaml", learning_rate=1e-4)
    print(result)  # one line; in a notebook a result is a table
    result.history.plot(x="step", y="loss")  # a pandas DataFrame
    print(solotune.chat(result.run_dir).reply("Hello"))

There is one function per verb, and the `solotune` command calls the same functions: `solotune.train` is the function in
`solotune/api/train.py`. No module directly below `solotune` has the name of a verb, because importing it would replace
the function. `import solotune` imports nothing else; each name is imported at its first use (PEP 562), so a script that
only lists runs does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.api.chat import chat
    from solotune.api.data import data
    from solotune.api.diagnose import diagnose
    from solotune.api.doctor import doctor
    from solotune.api.evaluate import evaluate
    from solotune.api.explain import explain
    from solotune.api.export import export
    from solotune.api.init import init
    from solotune.api.plan import plan
    from solotune.api.report import report
    from solotune.api.runs import runs
    from solotune.api.serve import serve
    from solotune.api.train import train
    from solotune.api.verify import verify
    from solotune.api.watch import watch
    from solotune.config.load import load_config
    from solotune.config.run_config import RunConfig

# No code from the hub: if the package `kernels` is installed, transformers downloads native code for some models.
# No telemetry. The libraries read both variables when they are imported; a variable that the user set stays.
os.environ.setdefault("USE_HUB_KERNELS", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__all__ = [
    "RunConfig",
    "__version__",
    "chat",
    "data",
    "diagnose",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "init",
    "load_config",
    "plan",
    "report",
    "runs",
    "serve",
    "train",
    "verify",
    "watch",
]

_FROM_CONFIG = {"RunConfig": "run_config", "load_config": "load"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'solotune' has no attribute {name!r}")
    module = f"solotune.config.{_FROM_CONFIG[name]}" if name in _FROM_CONFIG else f"solotune.api.{name}"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
