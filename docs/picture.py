"""Draw docs/demo.svg: the comparison of base and tuned model at the end of the demo, as the terminal shows it.

sh scripts/demo output_dir=runs/demo
python docs/picture.py runs/demo
"""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import solotune
from solotune.cli.results import print_evaluation

COLUMNS = 84


def main(run: str) -> None:
    found = solotune.evaluate(run)
    console = Console(width=COLUMNS, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    print_evaluation(replace(found, samples=found.samples[:1]), console)
    svg = console.export_svg(title="sh scripts/demo", clear=False)
    # rich names a font of a content delivery network; a page must not load anything from elsewhere
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = "\n".join(line.rstrip() for line in svg.splitlines() if line.strip())
    (Path(__file__).parent / "demo.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
