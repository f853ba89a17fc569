"""What a pass without gradients allocates, as the plan has it and as the allocator of a CPU counts it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from tiny import SHORT_RUN, save_model

from solotune.config.load import load_config
from solotune.dataset import Example
from solotune.evaluation import scores
from solotune.evaluation.generation import generate_all
from solotune.model.loading import TrainableModel, load_model
from solotune.planning.evaluation_memory import answers_moment, evaluation_moment
from solotune.planning.layer_profile import EvaluationMoment, ModelShape, Polynomial, Workload
from solotune.planning.model_shape import model_shape
from solotune.planning.profile_eager import Trace
from solotune.planning.profile_evaluation import moments_of

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that the CPU's allocator has given out at one time, temporary ones of kernels included."""
    run()  # what is made once
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str, str], tuple[TrainableModel, ModelShape]]:
    """made(family, precision) -> the model, and its shape as a plan has it."""

    def make(family: str, precision: str) -> tuple[TrainableModel, ModelShape]:
        folder = save_model(tmp_path_factory.mktemp(family), FAMILIES[family](**SHAPE))
        in_float32 = precision == "fp32"
        keys = {"base_precision": precision, "bf16": not in_float32, "use_cpu": in_float32, "torch_compile": False}
        names = {"model_name_or_path": folder, "dataset": "d", "base_residency": "quantized", "max_length": 1024}
        config = load_config({**SHORT_RUN, **names, **keys})
        dtype = torch.float32 if in_float32 else torch.bfloat16
        return load_model(config, torch.device("cpu"), dtype), model_shape(config)

    return make


def full_rows(rows: int, tokens: int, labels: int) -> list[Example]:
    rng = np.random.default_rng(0)
    learned = np.arange(tokens) >= tokens - labels
    return [Example(rng.integers(3, 4000, tokens).astype(np.int32), learned, f"r:{i}", []) for i in range(rows)]


@pytest.mark.parametrize(("family", "precision"), [("llama", "bf16"), ("qwen2", "nf4"), ("qwen3", "fp32")])
def test_an_evaluation_allocates_what_is_planned(family, precision, made):
    """Its peak is in the MLP, at a weight that is unpacked, or at the logits, as the size of the pass has it."""
    model, shape = made(family, precision)
    for rows, tokens, labels in ((4, 384, 8), (1, 512, 512), (1, 24, 4)):
        batch = full_rows(rows, tokens, labels)
        work = Workload(1, 1, 1, 1, 1, 1, None, eval_batch=(rows, tokens), eval_labels=labels)
        a_weight = shape.dtype_bytes + 4 / 64 if precision == "nf4" else 0.0
        planned = evaluation_moment(shape, work, a_weight)
        measured = allocated(lambda batch=batch: scores.score(model, batch, len(batch)))
        assert planned.size == pytest.approx(measured, rel=0.05), (rows, tokens, labels, planned)
        assert (planned.logits > planned.activations) == (labels == tokens)
        assert (planned.unpacked > 0) == (precision == "nf4" and tokens == 24)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_answers_allocate_what_is_planned(family, made):
    """One prompt has no mask; padded ones have, and repeat keys and values. Short prompts peak at their last token."""
    model, shape = made(family, "fp32")
    rng = np.random.default_rng(0)
    for rows, prompt, new in ((1, 384, 2), (3, 384, 2), (3, 12, 16)):
        prompts = [rng.integers(3, 4000, prompt - number).tolist() for number in range(rows)]
        planned = answers_moment(shape, Workload(1, 1, 1, 1, 1, 1, None, answers=(rows, prompt, new)), 0.0)
        measured = allocated(lambda prompts=prompts, new=new: generate_all(model, prompts, new, [], len(prompts)))
        assert planned.size == pytest.approx(measured, rel=0.1), (rows, prompt, new, planned)


def test_a_family_that_cannot_be_profiled_has_a_guess(tiny_config):
    shape = model_shape(tiny_config("mixtral"))
    work = Workload(1, 1, 1, 1, 1, 1, None, eval_batch=(2, 64), eval_labels=1)
    assert shape.layers[0].evaluation == ()
    assert evaluation_moment(shape, work, 0.0).size > shape.layers[0].forward_peak.at(2, 64)


def test_a_moment_that_another_one_exceeds_is_left_out():
    lengths = (512, 1024, 2048)
    passes = [
        [Trace(2.0 * t, 0, False), Trace(8.0 * t, 0, False), Trace(4.0 * t, 100, False), Trace(3.0 * t, 50, True)]
        for t in lengths
    ]
    assert moments_of(passes) == (
        EvaluationMoment(Polynomial(0, 4.0), 0, False),
        EvaluationMoment(Polynomial(0, 2.0), 100, False),
        EvaluationMoment(Polynomial(0, 1.5), 50, True),
    )
    uneven = [one[: number + 2] for number, one in enumerate(passes)]  # other operations at other lengths
    assert [one.weights for one in moments_of(uneven)] == [0]
