"""Models of real shapes whose random weights are made on the device while they are loaded, so none is on a disk.

    make_checkpoint(folder, MODELS["8B"])       config.json, and a weight file that has names and shapes and no bytes
    make_weights_here()                         from now on `load_model` makes the tensors that such a file names

The file is sparse: 141 GB of a 70B shape take a few KiB. Checks and fingerprints read it as any other one, as zeros.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SIZE, EMBEDDING, INTO_RESIDUAL = 0.02, 1.0, 0.0003
"""Standard deviations of a weight, of the embedding, and, as a share of it, of what a layer adds to its input.

Layers add little to a large embedding: else 80 random layers multiply each rounding error, and two gradients of one fp8
step differ by 130 %.
"""


def make_checkpoint(folder: Path, sizes: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Make a model folder, if it is not there; several processes may make the same one at the same time.

    Args:
        sizes: the content of config.json, less its dtype, which is bfloat16.
        tokenizer: a folder; its files are copied, all but weights and config, and the ids of begin and end of text are
            the tokenizer's. None: the model has none.
    """
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        config = {**sizes, "dtype": "bfloat16", **(_copied_tokenizer(tokenizer, made) if tokenizer else {})}
        (made / "config.json").write_text(json.dumps(config))
        _write_sparse(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def _copied_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copy a tokenizer's files; the ids that config.json takes from it."""
    from transformers import AutoTokenizer

    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "tokenizer.model"):
            shutil.copy(path, folder)
    ids = AutoTokenizer.from_pretrained(folder)
    return {"bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id}


def _write_sparse(folder: Path) -> None:
    """model.safetensors of the architecture in config.json, in bfloat16: its header, and no bytes after it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header, end = {}, 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in module.all_tied_weights_keys:
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


def size_of(name: str, names: Collection[str]) -> float:
    """The standard deviation of a weight matrix among the `names` of a checkpoint.

    A head that is the embedding makes the embedding as small as any other weight: logits of hundreds would be absurd.
    """
    embedding = EMBEDDING if "lm_head.weight" in names else SIZE
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return INTO_RESIDUAL * embedding
    return embedding if name.endswith("embed_tokens.weight") else SIZE


def make_weights_here() -> None:
    """Let the loader take random tensors, made on the GPU (or the CPU without one), for those of a checkpoint.

    They are the same in every process: a checkpoint's seed is 0, whatever torch's is. Vectors (norms, biases) are ones.
    """
    import torch

    from solotune.model import loading
    from solotune.model.weight_files import read_header

    def read(files: list[Path], match: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        shapes = {name: tuple(entry.shape) for path in files for name, entry in read_header(path).items()}
        for name, shape in shapes.items():
            if len(shape) == 1:
                yield match.names[name], torch.ones(shape, device=device, dtype=torch.bfloat16)
            else:
                random = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
                yield match.names[name], random.mul_(size_of(name, shapes))

    loading.read_tensors = read
