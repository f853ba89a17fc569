"""What libraries say about themselves is hidden; errors, solotune's own warnings and the caller's are not."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import pytest

from solotune.errors import SolotuneWarning
from solotune.runtime import library_noise
from solotune.runtime.library_noise import VARIABLES, quiet_libraries

HINT = "Failed to load CPU gemm_4bit_forward from kernels-community: please make sure you already `pip install kernels`"


@pytest.fixture
def said(monkeypatch):
    """Log lines that reach a handler of the root, which stands for the screen."""
    lines = []

    class Screen(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    screen = Screen()
    logging.getLogger().addHandler(screen)
    for name in ("bitsandbytes", "fsspec"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "warnoptions", [])
    yield lines
    logging.getLogger().removeHandler(screen)


def warn_as(module: str, category: type[Warning] = UserWarning) -> None:
    """A warning that is raised in a module."""
    warnings.warn_explicit("a warning", category, f"{module}.py", 1, module=module, registry={})


def test_hints_are_hidden_and_errors_are_not(said):
    hints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hints.warning(HINT)
    assert said == [HINT], "so it would be seen"
    with quiet_libraries():
        hints.warning(HINT)
        hints.error("the library is broken")
        logging.getLogger("my_app").warning("mine")
    hints.warning("afterwards")
    assert said == [HINT, "the library is broken", "mine", "afterwards"]


def test_a_level_and_a_variable_that_somebody_set_stay(said, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DATASETS_VERBOSITY", raising=False)
    logging.getLogger("fsspec").setLevel(logging.DEBUG)
    with quiet_libraries():
        logging.getLogger("fsspec").debug("traced")
        assert [os.environ[name] for name in VARIABLES[:2]] == ["info", "error"]
    logging.getLogger("fsspec").setLevel(logging.NOTSET)
    assert said == ["traced"] and "DATASETS_VERBOSITY" not in os.environ


@pytest.mark.parametrize(
    ("module", "category", "is_shown"),
    [
        ("torch.utils.checkpoint", FutureWarning, False),
        ("bitsandbytes.optim", UserWarning, False),
        ("tqdm.auto", UserWarning, False),
        ("solotune.training.loop", UserWarning, False),  # torch's native code, in the name of its caller
        ("solotune.training.loop", SolotuneWarning, True),
        ("__main__", UserWarning, True),
        ("torchmetrics", UserWarning, True),
    ],
)
def test_warnings_of_libraries_are_hidden_and_others_are_not(module, category, is_shown, said):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_libraries():
            warn_as(module, category)
        assert len(seen) == is_shown
        warn_as(module, category)
    assert len(seen) == is_shown + 1, "only in the block"


def test_a_verb_is_quiet(said, monkeypatch):
    """A decorator on each: `solotune.train` and the others are the functions themselves."""
    import solotune
    from solotune.hardware import doctor

    monkeypatch.setattr(doctor, "doctor", lambda: logging.getLogger("bitsandbytes").warning(HINT))
    solotune.doctor()
    assert said == []
    for verb in ("train", "data", "plan", "evaluate", "diagnose", "chat", "verify", "init"):
        assert getattr(solotune, verb).__wrapped__.__name__ == verb


def test_the_command_line_still_shows_its_own_warnings(said, monkeypatch):
    for name in (*VARIABLES, "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "x")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")  # put back in the end
    monkeypatch.setattr(library_noise, "LIBRARIES", ())
    with warnings.catch_warnings(record=True) as seen:
        library_noise.quieten()
        warn_as("torch.nn")
        warn_as("solotune.display.observer", SolotuneWarning)
    assert [one.category for one in seen] == [SolotuneWarning]
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
