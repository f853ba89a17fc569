"""python -m bench.diagnose.unseen.score FILE.jsonl: the table of a run, whole and by kind.

A verdict other than `fault` names nothing. Strict: the first name is the truth. Set-aware: it is one of the program's
names for the same thing, or of the bench's groups that explain the same evidence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EQUIVALENT = ({"F64", "F61"}, {"F67", "F61"}, {"F10", "F24"}, {"F21", "F18"}, {"F57", "F58"})


def accepted(truth: Sequence[str]) -> set[str]:
    return set(truth).union(*(group for group in EQUIVALENT if group & set(truth)))


def _suspect(code: str) -> str:
    from solotune.diagnosis.catalogue import FAULTS

    return FAULTS[code].suspect


def said(result: dict[str, Any]) -> list[str]:
    return result["named"] if result["verdict"] == "fault" else []


def _share(hits: list[bool]) -> float | None:
    return round(sum(hits) / len(hits), 4) if hits else None


def _rows(results: list[dict[str, Any]]) -> dict[str, Any]:
    faults, healthy = [r for r in results if r["truth"]], [r for r in results if not r["truth"]]
    first = [(said(r)[:1] or [None])[0] for r in faults]
    pairs = list(zip(faults, first, strict=True))
    return {
        "faults": len(faults),
        "codes": len({r["truth"][0] for r in faults}),
        "suspect top-1": _share([f is not None and _suspect(f) in set(map(_suspect, r["truth"])) for r, f in pairs]),
        "fault top-1, strict": _share([f == r["truth"][0] for r, f in pairs]),
        "fault top-1, set-aware": _share([f in accepted(r["truth"]) for r, f in pairs]),
        "fault in the first 3, set-aware": _share([bool(accepted(r["truth"]) & set(said(r)[:3])) for r in faults]),
        "faults undecided": sum(r["verdict"] == "undecided" for r in faults),
        "faults called healthy": sum(r["verdict"] == "healthy" for r in faults),
        "faults refused without a name": sum(r["verdict"] == "refused" for r in faults),
        "healthy": len(healthy),
        "healthy called fault": sum(r["verdict"] == "fault" for r in healthy),
        "healthy undecided": sum(r["verdict"] == "undecided" for r in healthy),
        "healthy refused": sum(r["verdict"] == "refused" for r in healthy),
        "failed": sum(r["verdict"] == "failed" for r in results),
    }


def table(results: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = sorted({r["kind"] for r in results})
    return {"all": _rows(results), **{kind: _rows([r for r in results if r["kind"] == kind]) for kind in kinds}}


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    print(json.dumps(table([json.loads(line) for line in lines]), indent=1))
