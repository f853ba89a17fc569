"""Check a wheel: python scripts/check_wheel.py WHEEL

It must contain the package, its licence and nothing else. The long description must be README.md without links to local
files. Prints each problem and exits with 1.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"


def problems(path: Path) -> Iterator[str]:
    """Yield one line for each problem of the wheel."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    package = {str(file.relative_to(SOURCE)) for file in SOURCE.rglob("*") if file.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    found = {name for name in names if not name.startswith(f"{info}/")}
    yield from (f"not in the wheel: {name}" for name in sorted(package - found))
    yield from (f"in the wheel, but not in the package: {name}" for name in sorted(found - package))
    if f"{info}/licenses/LICENSE" not in names:
        yield "no LICENSE"
    text = metadata.get_payload()
    assert isinstance(text, str)
    if metadata["Description-Content-Type"] != "text/markdown" or not text.startswith("# solotune"):
        yield "the long description is not README.md"
    yield from (f"link to a local file: {link}" for link in re.findall(r"\]\((?!\w+:|#)([^)]+)\)", text))


def main(path: Path) -> int:
    found = list(problems(path))
    print(f"{path.name}: " + ("; ".join(found) or f"package, licence and description, {path.stat().st_size:,} bytes"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
