"""Recognise secrets by their format, refuse them in a config, and remove them from output.

A config is saved in the run directory and an error in a log, and people share both. So a config value that looks like
a token is refused without being shown, and the text of every error and crash file goes through `without_secrets`. That
function also removes the values of environment variables whose names look like secrets.

What it does not do: find a secret that looks like an ordinary word.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# formats as published: Hugging Face, OpenAI and similar, GitHub, GitLab, AWS, Google, Slack, Weights & Biases'
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
_MIN_LENGTH = 8  # shorter values of variables are words like `true`


def is_secret(text: str) -> bool:
    """Whether a text contains what looks like a token, a private key, or user and password in a URL."""
    return _TOKEN.search(text) is not None or _USERINFO.search(text) is not None


def is_secret_name(key: str) -> bool:
    """Whether the name of a key or variable says that it holds a secret."""
    return _NAME.search(key) is not None


def without_secrets(text: str) -> str:
    """Replace every known or recognised secret in a text with `***`."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return _USERINFO.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))
