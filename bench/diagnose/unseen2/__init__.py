"""A second set of programs made without sight of the diagnosis's rules: `python -m bench.diagnose.unseen2`.

- what: 248 fine-tunings, 108 of them healthy, the rest with one fault each, of 76 of the 78 codes. They were written
  from the list of faults and from issue threads alone, with five bases of other architectures, tokenizers and templates
  (bases.py), fourteen tasks (tasks.py) and changes of their own (healthy*.py, faults_*.py).
- how to run: `--list`, `--bases`, `--only WORD`, `--kind own`, `--jobs N`, `--minutes M`, `--out FILE`, as in the first
  set, whose make.py, run.py and score.py it shares. `python -m bench.diagnose.unseen2.verify` shows without the
  diagnosis that each change takes effect, and that healthy runs learn and stop.
- what is not covered: F27 and F32 (they need absolute positions, which none of the bases has); runs of several GPUs;
  runs of TRL, Axolotl, LLaMA-Factory and Unsloth themselves: `alone` and `folder` are transformers' Trainer, beside
  config and rows in the form of such a tool.
"""
