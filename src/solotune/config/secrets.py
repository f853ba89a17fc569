"""Recognise secrets by their format or their key, refuse them in a config, and remove them from output.

A config is saved in the run directory and an error in a log, and people share both. So a config value that looks like
a token is refused without being shown, and the text of every error and crash file goes through `without_secrets`. That
function also removes the values of environment variables whose names look like secrets.

    hf_token: hf_abc...         a secret by its format
    wandb: {api_key: 0123...}   a secret by its key, at any depth
    eos_token: <|im_end|>       none: a token of a tokenizer; so are pad_token, trainable_token_indices, max_token

What it does not do: find a secret that looks like an ordinary word, under a key that says nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# formats as published: Hugging Face, OpenAI and similar, GitHub, GitLab, AWS, Google, Slack, Weights & Biases' new and
# local keys, Groq, NVIDIA, Replicate, Stripe, SendGrid, npm, PyPI, DigitalOcean, xAI, JSON web tokens, private keys,
# signed URLs, webhooks
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|wandb_v\d_\w{16,}|local-[0-9a-f]{40}|gsk_[A-Za-z0-9]{20,}|nvapi-[\w-]{20,}"
    r"|r8_[A-Za-z0-9]{20,}|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,}|SG\.[\w-]{10,}\.[\w-]{10,}"
    r"|npm_[A-Za-z0-9]{20,}|pypi-[\w-]{20,}|dop_v1_\w{20,}|xai-[A-Za-z0-9]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{16,}"
    r"|(?<=[?&])(?:access_|auth_)?(?:token|api_?key|sig(?:nature)?|X-Amz-(?:Signature|Credential|Security-Token))"
    r"=[^&\s]{8,}"
)
_USERINFO = re.compile(r"(?<=://)[^\s/@:]*:?[^\s/@]*(?=@)")
_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|WEBHOOK"
    r"|(?:API|ACCESS|PRIVATE|SECRET|AUTH|WANDB|COMET|SWANLAB|HF|HUB|OPENAI|AWS|AZURE)_?KEY)(?:_|$)",
    re.IGNORECASE,
)
_TOKENIZERS = (
    r"(?:eos|bos|pad|unk|sep|cls|mask|eot|eod|eom|boi|eoi|end|start|stop|begin|image|img|video|audio|vision|box|object|"
    r"special|think|thinking|reasoning|tool|turn|newline|blank|prefix|suffix|middle|fim|reserved|new|per|num|max|min|"
    r"total|first|last|next|ignore|message|header|placeholder)"
)
# `eos_token`, and `token_` with more behind it: `trainable_token_indices`, `eos_token_id`
_NO_SECRET = re.compile(
    rf"(?:^|_)(?:{_TOKENIZERS}_token(?:_|$)|token_(?!value|secret|key|file|path|str|string|env))", re.IGNORECASE
)
_PLACEHOLDER = re.compile(
    r"\s*(?:<[^>]*>|\[[^\]]*\]|\{\{.*\}\}|\$\{?\w+\}?|\*+|x+|none|null|true|false|yes|no|auto|your[_-].*|\.{3})?\s*",
    re.IGNORECASE,
)
_MIN_LENGTH = 8  # shorter values of variables are words like `true`


def is_secret(text: str) -> bool:
    """Whether a text contains what looks like a token, a private key, or user and password in a URL."""
    return _TOKEN.search(text) is not None or _USERINFO.search(text) is not None


def is_secret_name(key: str) -> bool:
    """Whether the name of a key or variable says that it holds a secret."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])|[-. ]", "_", key)
    if _NO_SECRET.search(snake):
        snake = _without_token(snake)  # `eos_token_api_key` still is one
    return _NAME.search(snake) is not None


def holds_secret(key: str, value: Any, by_name: bool = True) -> bool:
    """Whether a key of a config or anything in its value, at any depth, looks like a secret.

    Args:
        by_name: also judge by names; not for keys of solotune, where `column_mapping: {token: prompt}` is a column.
    """
    if is_secret(key):
        return True
    if isinstance(value, Mapping):
        return any(holds_secret(str(inner), item, by_name) for inner, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(holds_secret(key, item, by_name) for item in value)
    if isinstance(value, str) and is_secret(value):
        return True
    if not by_name:
        return False
    # a flag such as `use_auth_token: true` and a placeholder such as `<HUB_TOKEN>` say nothing
    says_something = isinstance(value, str) and not _PLACEHOLDER.fullmatch(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and _NAME.search(_without_token(key)) is not None
    return is_secret_name(key) and (says_something or is_number)


def without_secrets(text: str) -> str:
    """Replace every known or recognised secret in a text with `***`."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_LENGTH and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    return _USERINFO.sub(HIDDEN, _TOKEN.sub(HIDDEN, text))


def _without_token(key: str) -> str:
    return re.sub(r"token", "", key, flags=re.IGNORECASE)
