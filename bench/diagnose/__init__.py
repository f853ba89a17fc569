"""Faults made on purpose, and how often the diagnosis names them: `python -m bench.diagnose`.

worlds.py     what the synthetic texts and chats are about
bases.py      tiny models that are pretrained on them for a minute and kept
recipe.py     everything that one training does, as plain fields that a fault changes
loop.py       that training, with plain transformers and PEFT
run_facts.py  what a diagnosis gets of it
ours.py       runs of solotune's own instead, from a config to its run directory: ours_faults.py, ours_healthy.py
configs.py    configs of ordinary people, all healthy: real_configs.py (real files), templated_configs.py (templated.py)
programs.py   all programs: faults_*.py, healthy.py, foreign.py, ours_*.py, fitted and held out, and those configs
run.py        one program: train, diagnose
score.py      how often it was right
"""
