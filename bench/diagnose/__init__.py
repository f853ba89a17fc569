"""Faults made on purpose, and how often the diagnosis names them: `python -m bench.diagnose`.

worlds.py     what the synthetic texts and chats are about
bases.py      tiny models that are pretrained on them for a minute and kept
recipe.py     everything that one training does, as plain fields that a fault changes
loop.py       that training, with plain transformers and PEFT
subject.py    what a diagnosis is given of it
programs.py   all programs: faults_*.py, healthy.py, pairs.py, foreign.py, fitted and held out
run.py        one program: train, diagnose
score.py      how often it was right
"""
