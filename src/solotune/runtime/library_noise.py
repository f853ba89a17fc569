"""Keep what libraries say about themselves off the screen: hints to install kernels, deprecations, missing extras.

    with quiet_libraries(): ...         as a decorator too: every verb of the Python API is in it
    quieten()                     for the command line, before the libraries are loaded

Only their warnings and log lines below ERROR are hidden: a user can do nothing about them. Their errors, solotune's own
warnings (`SolotuneWarning`) and those of the caller's code are shown. A level, an environment variable or `python -W`
that the user has set stays as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from solotune.errors import SolotuneWarning

LIBRARIES = (
    "transformers", "datasets", "huggingface_hub", "bitsandbytes", "torch", "kernels", "tokenizers", "safetensors",
    "tqdm", "filelock", "fsspec", "urllib3", "httpx", "lm_eval", "evaluate", "absl",
)  # fmt: skip
VARIABLES = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY")
"""Read when a library is imported, which then sets the level of its own logger."""
NATIVE_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""Read when torch is loaded: its native code writes a stack trace when a connection between ranks ends."""
_WHERE = rf"(solotune|{'|'.join(LIBRARIES)})(\.|$)"  # torch's native code warns in the name of the module that calls it


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide warnings and log lines of libraries in the block."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    unset = [name for name in VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "error"))
    _raise_levels(loggers)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings("ignore", module=_WHERE)
                warnings.filterwarnings("default", category=SolotuneWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in unset:
            os.environ.pop(name, None)


def quieten() -> None:
    """Hide warnings, log lines and progress bars of libraries from now on."""
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # transformers reads the first too
    values = {**dict.fromkeys(bars, "1"), **dict.fromkeys(VARIABLES, "error"), NATIVE_LEVEL: "ERROR"}
    for name, value in values.items():
        os.environ.setdefault(name, value)
    _raise_levels([logging.getLogger(name) for name in LIBRARIES])
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=SolotuneWarning)


def _raise_levels(loggers: list[logging.Logger]) -> None:
    for logger in loggers:
        if logger.level in (logging.NOTSET, logging.WARNING):  # others were set by somebody
            logger.setLevel(logging.ERROR)
