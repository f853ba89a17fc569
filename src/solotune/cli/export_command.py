"""The command `solotune export`, as the other verbs in `commands`: parse, call the verb, print the result."""

from __future__ import annotations

import click

from solotune.cli.options import json_option
from solotune.cli.output import print_result, shown


@click.command()
@click.argument("target")
@click.option(
    "--to",
    default="adapter,merged",
    show_default=True,
    metavar="KINDS",
    help="adapter, merged, gguf, ollama, adapter-gguf, vllm.",
)
@click.option("--out", metavar="DIR", help="Folder to write into. [default: export in the run]")
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), help="Of merged weights. [default: that of the base]")
@click.option(
    "--merge-into",
    type=click.Choice(["original", "dequantized"]),
    help="Base to merge into. [default: measured, the one nearest to the trained model]",
)
@click.option(
    "--quantization", default="f16", show_default=True, metavar="TYPES", help="Of GGUF files: f16, q8_0, q4_k_m, ..."
)
@click.option("--base", metavar="MODEL", help="The base model; for a run, only if it has moved.")
@click.option("--dataset", metavar="DATA", help="Rows to measure with (only for adapters of other trainers).")
@click.option(
    "--base-precision",
    type=click.Choice(["nf4", "bf16"]),
    help="How another trainer stored the base: nf4 for QLoRA.",
)
@click.option("--push", metavar="REPO", help="Upload to owner/name on the hub, a new or an empty repository.")
@click.option("--public", is_flag=True, help="With --push: everybody may read it. [default: only you]")
@json_option
@click.pass_context
def export(
    ctx: click.Context,
    target: str,
    to: str,
    out: str | None,
    dtype: str | None,
    merge_into: str | None,
    quantization: str,
    base: str | None,
    dataset: str | None,
    base_precision: str | None,
    push: str | None,
    public: bool,
    as_json: bool,
) -> None:
    """Export a RUN for other programs, and compare each file with what was trained.

    TARGET is a run, or an adapter folder of PEFT, TRL, Unsloth or Axolotl (then with --base). KINDS, with commas:

    \b
      adapter       for PEFT and vLLM
      merged        adapter and base added: a model folder
      gguf          for llama.cpp, from the merged folder
      ollama        a GGUF file with its Modelfile
      adapter-gguf  the adapter as GGUF, beside its base
      vllm          check the files, say how to serve them

    Each is loaded again with the library that users load it with (vLLM and Ollama are not run). If it differs from the
    trained model by more than its format allows, the exit code is 3. Nothing that exists is overwritten.

    \b
    Example:
      solotune export runs/solotune-20260101-120000
    """
    with shown() as display:
        from solotune.api.export import export
        from solotune.cli.export_result import print_export

        found = export(
            target,
            to,
            out=out,
            base=base,
            dataset=dataset,
            base_precision=base_precision,
            dtype=dtype,
            merge_into=merge_into,
            quantization=quantization,
            push=push,
            public=public,
            display=display,
        )
    print_result(found, print_export, as_json)
    ctx.exit(0 if found.ok else 3)
