"""README.md as the package's long description, a hook of hatchling.

A package index shows only the text, so links to files of the repository would be broken there. Such a link is replaced
by its text, and a picture is left out; the files are in the source distribution.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"!\[[^\]]*\]\((?!\w+:)[^)]+\)\n*")
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)[^)]+\)")


class LongDescription(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = RELATIVE_LINK.sub(r"\1", PICTURE.sub("", readme))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
