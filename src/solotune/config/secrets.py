"""Secrets: recognised by their looks, refused in a config, and taken out of what is written or shown.

A config is copied into the run directory, an error into a log, and both are shared. So a value that looks like a token
is refused at the door, without being shown, and every text that leaves through an error or a crash file goes through
`without_secrets`, which also knows the values of this process's environment variables that are named like secrets.

What it does not do: find a secret that looks like any other word.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# as their makers publish them: Hugging Face, OpenAI and alike, GitHub, GitLab, AWS, Google, Slack, Weights & Biases'
# new keys, JSON web tokens, private keys
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|wandb_v\d_\w{16,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_USERINFO = re.compile(r"(?<=://)[^\s/@:]*:?[^\s/@]*(?=@)")
_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?)(_|$)", re.IGNORECASE
)
_MIN_LENGTH = 8  # shorter values of variables are words such as `true`


def is_secret(text: str) -> bool:
    """Whether a text holds something that looks like a token, a private key, or a URL's user and password."""
    return _TOKEN.search(text) is not None or _USERINFO.search(text) is not None


def is_secret_name(key: str) -> bool:
    """Whether a key or variable is named like one that holds a secret."""
    return _NAME.search(key) is not None


def without_secrets(text: str) -> str:
    """The text with every secret that is known or recognised as `***`."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return _USERINFO.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
