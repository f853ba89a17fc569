"""python -m bench.diagnose.unseen4.verify [--trained] [--healthy | --faults] [--jobs N] [--out FILE] [WORD ...]

Without the diagnosis, as the third set's verify.py, with this set's programs and proofs (shown.py).
"""

from __future__ import annotations

from bench.diagnose.unseen3 import case
from bench.diagnose.unseen3 import verify as third
from bench.diagnose.unseen4.parts import PARTS
from bench.diagnose.unseen4.shown import shown, sound

if __name__ == "__main__":
    case.PARTS = third.PARTS = PARTS
    third.shown, third.sound = shown, sound
    third.main()
