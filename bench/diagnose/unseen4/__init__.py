"""A fourth set of programs made without sight of the diagnosis's rules: `python -m bench.diagnose.unseen4`.

- what: fine-tunings, a third of them healthy, the rest with one fault each, of all 78 codes. They were written from
  the list of faults and from issue threads alone, with five bases of architectures, tokenizers and templates that no
  other set has (bases.py), fourteen tasks (tasks.py), the third set's loops and one more (styles.py) and changes of
  their own (healthy.py, faults_*.py).
- how to run: `--list`, `--bases`, `--only WORD`, `--kind own`, `--jobs N`, `--minutes M`, `--out FILE`, as in the first
  set, whose make.py, run.py and score.py it shares. `python -m bench.diagnose.unseen4.verify` shows without the
  diagnosis what each fault violates (shown.py); with `--trained`, that healthy runs learn and stop.
- what is not covered: runs of several GPUs; runs of TRL, Axolotl, LLaMA-Factory and Unsloth themselves: `alone` and
  `folder` are transformers' Trainer, beside config and rows in the form of such a tool. F01 and F70 to F73 need
  a card, so they are written as the logs of a 7B model.
"""
