"""A third set of programs made without sight of the diagnosis's rules: `python -m bench.diagnose.unseen3`.

- what: fine-tunings, half of them healthy, the rest with one fault each, of nearly all codes. They were written from
  the list of faults and from issue threads alone, with five bases of other architectures, tokenizers and templates
  (bases.py), thirteen tasks (tasks.py), loops by hand in four styles (styles.py) and changes of their own (healthy*.py,
  faults_*.py).
- how to run: `--list`, `--bases`, `--only WORD`, `--kind own`, `--jobs N`, `--minutes M`, `--out FILE`, as in the first
  set, whose make.py, run.py and score.py it shares. `python -m bench.diagnose.unseen3.verify` shows without the
  diagnosis what each fault violates; with `--trained`, that healthy runs learn and stop.
- what is not covered: runs of several GPUs; runs of TRL, Axolotl, LLaMA-Factory and Unsloth themselves: `alone` and
  `folder` are transformers' Trainer, beside config and rows in the form of such a tool. F01 and F70 to F73 need
  a card, so they are written as the logs of an 8B model.
"""
