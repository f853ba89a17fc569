"""List what lies in a trainer's folder and next to it: the only places where `solotune diagnose FOLDER` looks.

    around = Surroundings.of("project/output/checkpoint-50")       the run's folder is project/output
    around.data                                                    data files in the places below
    around.named("./data/train.jsonl", around.data)                the file in the list that this name means, or None

Next to a folder means: its parent, and in both the folders `data`, `dataset` and `datasets` (for data), `config` and
`configs` (for settings), `model`, `models` and `base` (for models). Nothing else is listed, no link is followed, and at
most `NUM_ENTRIES` names of a folder are read.

A name that a file gives is only compared with this list. It is never opened, so it leads nowhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from solotune.dataset.readers.files import format_of
from solotune.regular_files import open_regular

NUM_ENTRIES = 2000
"""Names that are read of one folder."""
DATA_FOLDERS = ("data", "dataset", "datasets")
CONFIG_FOLDERS = ("config", "configs")
MODEL_FOLDERS = ("model", "models", "base")
_NOT_DATA = re.compile(
    r"(.*config|tokenizer.*|trainer_state|.*_results|special_tokens_map|added_tokens|vocab|.*\.index|dataset_info|state"
    r"|args|package.*|dataset_dict|preprocessor.*|processor.*|wandb-.*|modules|chat_template.*|quant.*|.*settings"
    r"|.*predictions?|manifest|environment|plan|data|diagnosis|evaluation)\.json"
    r"|((.*[._-])?(logs?|logging|metrics)([._-].*)?|.*predictions?)\.(jsonl|csv)",
    re.IGNORECASE,
)
"""Files of models, trainers and runs whose name would fit a data file."""


@dataclass(frozen=True)
class Surroundings:
    """Regular files and folders in the allowed places; the nearest places come first."""

    folder: Path
    """The run's folder; of a checkpoint its parent."""
    data: tuple[Path, ...]
    """Files whose name is that of a data file."""
    saved_datasets: tuple[Path, ...]
    """Folders of `Dataset.save_to_disk`."""
    configs: tuple[Path, ...]
    """YAML and JSON files that may be a config; whether they are, their content says."""
    models: tuple[Path, ...]
    """Folders with a config.json."""

    @classmethod
    def of(cls, target: Path) -> Surroundings:
        """The surroundings of a folder that the user pointed at."""
        folder = Path(os.path.abspath(target))
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            folder = folder.parent
        homes = [folder] if folder.parent == folder else [folder, folder.parent]
        data = [place for home in homes for place in _with(home, DATA_FOLDERS)]
        models = [place for home in homes for place in _with(home, MODEL_FOLDERS)]
        files = [file for place in data for file in files_of(place)]
        inner = [one for place in data for one in folders_of(place)]
        nested = [one for place in inner if not _is_saved(place) for one in folders_of(place, 50)]
        return cls(
            folder,
            tuple(file for file in files if format_of(file) is not None and not _NOT_DATA.fullmatch(file.name)),
            tuple(one for one in dict.fromkeys([*data[1:], *inner, *nested]) if _is_saved(one)),
            tuple(
                file
                for home in homes
                for place in _with(home, CONFIG_FOLDERS)
                for file in files_of(place)
                if file.suffix.lower() in (".yaml", ".yml") or file.name == "args.json"
            ),
            tuple(dict.fromkeys(one for place in models for one in folders_of(place) if _has(one, "config.json"))),
        )

    def shown(self, path: Path) -> str:
        """A path as the user would type it from the run's folder: `../train.jsonl`."""
        return os.path.relpath(path, self.folder)

    def is_inside(self, path: Path) -> bool:
        """Whether it is in the run's folder itself."""
        return path.is_relative_to(self.folder)

    def named(self, name: object, among: Iterable[Path]) -> Path | None:
        """The path of these that a written name means: the same last part, and most of the parts before it.

        Of several with equally many equal parts, the nearest.
        """
        parts = _parts(name)
        best, length = None, 0
        for path in among:
            common = _common(parts, path.parts)
            if common > length:
                best, length = path, common
        return best

    @property
    def dataset_info(self) -> tuple[Path, ...]:
        """LLaMA-Factory's lists of data sets, next to the data."""
        places = dict.fromkeys(file.parent for file in self.data)
        return tuple(place / "dataset_info.json" for place in places if _has(place, "dataset_info.json"))


def files_of(folder: Path) -> list[Path]:
    """The regular files of a folder, sorted; links are left out."""
    return sorted(entry for entry in _listed(folder) if _is(entry, file=True))


def folders_of(folder: Path, most: int = NUM_ENTRIES) -> list[Path]:
    """The folders in a folder, sorted; links and hidden folders are left out."""
    inner = (entry for entry in _listed(folder) if not entry.name.startswith((".", "checkpoint-")))
    return sorted(entry for entry in inner if _is(entry, file=False))[:most]


def is_array(file: Path) -> bool:
    """Whether a JSON file is a list, as data is, and not an object, as settings are."""
    try:
        with open_regular(file) as opened:
            return opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    except OSError:
        return False


def _listed(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= NUM_ENTRIES:
                    return
                yield Path(entry.path)
    except OSError:
        return


def _is(path: Path, file: bool) -> bool:
    if path.is_symlink():
        return False
    return path.is_file() if file else path.is_dir()


def _with(home: Path, names: Sequence[str]) -> list[Path]:
    return [home, *(home / name for name in names if _is(home / name, file=False))]


def _has(folder: Path, name: str) -> bool:
    return _is(folder / name, file=True)


def _is_saved(folder: Path) -> bool:
    return _has(folder, "state.json") and _has(folder, "dataset_info.json")


def _parts(name: object) -> tuple[str, ...]:
    """The parts of a written path or hub id, of any system."""
    if not isinstance(name, str) or len(name) > 4096 or "\0" in name:
        return ()
    return tuple(part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~"))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of equal parts at the end."""
    equal = 0
    for mine, theirs in zip(reversed(one), reversed(other), strict=False):
        if mine != theirs:
            break
        equal += 1
    return equal
