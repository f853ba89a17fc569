"""The catalogue: fifteen suspects, their 78 faults, and which of them the same evidence cannot tell apart.

A *suspect* is one of the things that whoever fine-tunes sets up; a *fault* is one way in which it is wrong. Codes are
for machines and never change their meaning; slugs are for people.

    FAULTS["F17"].slug, .suspect, .title, .fix, .expect
    find("F17")  find("pad-masks-terminator")  find("S4")

What a fault looks like, how it is told from its look-alikes and where that is known from stands in the docstring of its
rule (`suspects`), which is what `solotune explain` prints. Here is what a sentence needs: the title says the cause, the
fix what to change where no rule knows the line better, `expect` what is then seen.

`prevented` says why a training by solotune itself cannot have the fault. Its rule is for the trainings of others, and
stands guard over ours.

The file is long because it is one table, and is read as one.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from solotune.errors import InputError

SUSPECTS: dict[str, str] = {
    "S1": "environment and library versions",
    "S2": "base model and tokenizer",
    "S3": "chat template and special tokens",
    "S4": "loss mask",
    "S5": "sequence length and truncation",
    "S6": "padding, attention mask and positions",
    "S7": "packing",
    "S8": "dataset content and order",
    "S9": "split and evaluation",
    "S10": "quantisation",
    "S11": "numeric precision",
    "S12": "LoRA adapter",
    "S13": "optimizer and learning rate",
    "S14": "batch, memory and loop",
    "S15": "save, resume, merge, serve",
}


@dataclass(frozen=True)
class Fault:
    """One way in which a suspect is wrong."""

    code: str
    slug: str
    suspect: str
    title: str  # the cause, in one sentence
    fix: str
    expect: str  # what is seen once it is mended
    prevented: str = ""  # why our own trainings cannot have it

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "slug": self.slug, "suspect": self.suspect, "title": self.title}


_STOPS = "answers end where they should"
_FIRST_LOSS = "the first loss falls to that of the same rows in the model's own format"
_LEARNS = "the loss leaves its plateau within the first tens of steps"
_FASTER = "the same steps take less time; losses stay as they are"
_FITS = "the peak falls below the card's memory; losses stay as they are"
_EFFECT = "the tuned model's answers differ from the base's"
_HONEST = "the held-out loss becomes higher, and true"

_FAULTS = (
    Fault("F01", "binary-mismatch", "S1",
        "bitsandbytes has no binary that fits this torch's CUDA.",
        "install a bitsandbytes that ships this CUDA's binary, and unset BNB_CUDA_VERSION",
        "4-bit layers load and compute",
    ),
    Fault("F02", "renamed-argument", "S1",
        "A setting was passed under a name that this version does not read; its default held.",
        "pass it under the name of the installed version, and read it back from the trainer",
        "the setting that was meant takes effect",
        prevented="unknown keys are refused, with the name to use",
    ),
    Fault("F03", "changed-default", "S1",
        "A value that was left out is another one in this version than the recipe assumes.",
        "write down every value that matters: learning_rate, bf16, gradient_checkpointing, max_length",
        "memory and speed of learning become those of the recipe",
        prevented="defaults are recorded in the run's config.yaml",
    ),
    Fault("F04", "wrong-tokenizer", "S2",
        "The tokenizer is not the one that the model was trained with.",
        "take tokenizer and model from the same place and revision",
        "the loss on plain text becomes normal",
    ),
    Fault("F05", "ids-beyond-embedding", "S2",
        "Token ids and rows of the embedding do not match.",
        "resize the embedding to the larger of its size and the tokenizer's, or use the tokenizer as it came",
        "no index error, and no token reads another's row",
    ),
    Fault("F06", "untrained-embedding", "S2",
        "Tokens of the data have embedding rows that nothing has ever trained.",
        "train these rows (trainable_token_indices or modules_to_save in PEFT), or use tokens that the base knows",
        "the loss on these tokens falls with that of the others",
    ),
    Fault("F07", "markers-as-text", "S2",
        "The template's control tokens are split like ordinary text.",
        "use the template that belongs to the tokenizer, or declare its markers as special tokens",
        _FIRST_LOSS,
    ),
    Fault("F08", "double-bos", "S3",
        "Rows begin with two begin-of-text tokens.",
        "tokenize rendered text with add_special_tokens=False",
        "training and serving see the same first tokens",
    ),
    Fault("F09", "missing-bos", "S3",
        "Rows lack the begin-of-text token that the model expects.",
        "let the model's own template write the beginning",
        "the first loss falls a little; serving matches training",
    ),
    Fault("F10", "terminator-missing", "S3",
        "No token ends the assistant's turn in the training rows.",
        "end answers with the template's end-of-turn token",
        _STOPS,
    ),
    Fault("F11", "template-differs", "S3",
        "The model is served with another template than it was trained with.",
        "serve with the chat template that was saved beside the adapter",
        "answers become those of the evaluation",
        prevented="one function renders for training and for serving, and the template is saved beside the adapter",
    ),
    Fault("F12", "not-through-chat-template", "S3",
        "The rows are not in the chat format that the model was taught.",
        "give the data as a messages column, so that the model's own template renders it",
        _FIRST_LOSS,
    ),
    Fault("F13", "role-dropped", "S3",
        "The template leaves a role of the conversations out, without a word.",
        "merge these messages into the user's, in training and in serving alike",
        "the model sees its instructions",
    ),
    Fault("F14", "stops-elsewhere", "S3",
        "Generation stops on another token than the one that answers end with.",
        "add the end-of-turn token to eos_token_id in generation_config.json",
        _STOPS,
    ),
    Fault("F15", "header-learned", "S3",
        "The role header before the answer is missing, doubled, or learned as part of the answer.",
        "render prompts with add_generation_prompt, and begin the learned part after the header",
        "answers begin with their first word",
    ),
    Fault("F16", "prompt-is-no-prefix", "S3",
        "The prompt's tokens are not the beginning of the row's tokens.",
        "end the prompt at a token boundary, and render history the same way both times",
        "the answer is learned after the tokens that it will be asked after",
    ),
    Fault("F17", "pad-masks-terminator", "S4",
        "Padding equals the end token, and the mask of pads takes the end of answers along.",
        "set another pad_token than eos, or mask pads by position",
        _STOPS,
        prevented="padding is masked by position, never by id",
    ),
    Fault("F18", "no-generation-markers", "S4",
        "The template has no generation markers, so the assistant mask says nothing.",
        "use a training template with {% generation %} markers",
        "a share of each row is learned, neither none nor all",
        prevented="masks are found without markers; a row that cannot be masked is an error",
    ),
    Fault("F19", "terminator-masked", "S4",
        "The mask ends before the end-of-turn token.",
        "close the generation block behind the end-of-turn token",
        _STOPS,
    ),
    Fault("F20", "prompt-learned", "S4",
        "Prompts are learned although only answers should be.",
        "apply the assistant mask: assistant_only_loss: true",
        "the loss becomes that of the answers alone",
    ),
    Fault("F21", "nothing-learned", "S4",
        "The mask covers every token: the marker of the answer is not found in the tokens.",
        "mask by the template's offsets, or give the marker as it is tokenized within a row",
        "the loss is no longer 0 or NaN",
    ),
    Fault("F22", "labels-shifted", "S4",
        "Labels are shifted against their tokens: shifted before, and by the model again.",
        "pass labels = input_ids; the model shifts them itself",
        "the first loss falls to that of the base, and outputs no longer skip tokens",
        prevented="a row holds a mask and no labels, so they cannot be shifted",
    ),
    Fault("F23", "mask-inverted", "S4",
        "The mask is inverted: prompts are learned and answers are not.",
        "invert the mask",
        "the model answers instead of asking",
    ),
    Fault("F24", "answers-cut", "S5",
        "max_length cuts the ends off long answers.",
        "raise max_length, or drop longer rows",
        _STOPS,
    ),
    Fault("F25", "prompt-fills-window", "S5",
        "Prompts fill max_length, and nothing of the answer is left to learn.",
        "raise max_length",
        "rows are no longer lost, and the loss is no longer 0 or NaN",
    ),
    Fault("F26", "prompt-cut", "S5",
        "Long rows lose their beginning, so answers stand without their question.",
        "truncate at the end (keep_start), or drop longer rows",
        "the first loss falls",
        prevented="truncation keeps the start",
    ),
    Fault("F27", "left-padding-positions", "S6",
        "Left padding shifts the positions of a model that counts them absolutely.",
        "pad on the right, or pass position_ids counted from the first real token",
        "a row has the same loss alone and padded",
        prevented="rows are padded on the right",
    ),
    Fault("F28", "pads-attended", "S6",
        "Padding is attended to: the attention mask is missing or wrong.",
        "pass attention_mask, 0 where a token is padding",
        "a row has the same loss alone and padded",
        prevented="rows are padded on the right, where causal attention cannot reach",
    ),
    Fault("F29", "padding-learned", "S6",
        "Padding is among what is learned.",
        "set labels to -100 where attention_mask is 0",
        "the loss rises to that of the real tokens",
        prevented="labels go by position",
    ),
    Fault("F30", "learned-from-pad", "S6",
        "Left padding makes the first real token something to be learned from padding.",
        "pad on the right",
        "the count of learned tokens no longer depends on the padding",
        prevented="rows are padded on the right",
    ),
    Fault("F31", "packed-rows-mix", "S7",
        "Packed rows attend to one another.",
        "restart position_ids at each row, pass no attention_mask, and set use_cache=False",
        "a packed row has the loss that it has alone",
        prevented="checked on the model before the run",
    ),
    Fault("F32", "positions-not-reset", "S7",
        "Positions run on from row to row within a pack.",
        "restart position_ids at each row",
        "a packed row has the loss that it has alone",
        prevented="checked before the run",
    ),
    Fault("F33", "packing-loses-rows", "S7",
        "Packing cuts or drops rows.",
        "raise max_length, or split long rows instead of cutting them",
        "as many tokens are learned as the data has",
        prevented="packing only joins whole rows, and says how full they are",
    ),
    Fault("F34", "empty-answers", "S8",
        "Answers are empty.",
        "drop these rows",
        "answers are no longer empty",
    ),
    Fault("F35", "constant-answers", "S8",
        "Nearly all answers are the same.",
        "remove or rebalance the repeated answer",
        "answers depend on the question",
    ),
    Fault("F36", "broken-turns", "S8",
        "Roles have wrong names or do not alternate.",
        "map the roles to system, user, assistant",
        "every answer is found, under a header that the model knows",
    ),
    Fault("F37", "bad-encoding", "S8",
        "The text was decoded with the wrong encoding.",
        "decode it again: text.encode('latin-1').decode('utf-8')",
        "the first loss falls; no odd characters in answers",
    ),
    Fault("F38", "misaligned-answers", "S8",
        "Answers do not belong to their prompts.",
        "join prompts and answers again by their key",
        "the right prompt lowers an answer's loss again",
    ),
    Fault("F39", "duplicates", "S8",
        "The same rows stand in the data many times.",
        "remove duplicates before the split",
        "the loss no longer falls in steps at each repeat",
    ),
    Fault("F40", "sorted-rows", "S8",
        "Rows are sorted and are trained on in that order.",
        "shuffle",
        "the loss no longer drifts with the place in the file",
        prevented="every epoch is a new permutation",
    ),
    Fault("F41", "repeated-by-workers", "S8",
        "Every loader worker reads all of the data.",
        "shard the dataset by worker",
        "an epoch sees each row once",
        prevented="there are no workers",
    ),
    Fault("F42", "long-tail", "S8",
        "A few very long rows decide the peak of memory, at a late step.",
        "cap max_length, and try the longest batch first",
        "no out-of-memory error late in the run",
        prevented="the largest step is planned and tried before the run",
    ),
    Fault("F43", "evaluated-on-training", "S9",
        "The evaluation's rows are training rows.",
        "hold rows out: validation_size: 0.05",
        _HONEST,
    ),
    Fault("F44", "leaked-passages", "S9",
        "Held-out rows have copies or near-copies among the training rows.",
        "remove duplicates first and split by group: split_by",
        _HONEST,
    ),
    Fault("F45", "evaluated-in-training-mode", "S9",
        "The evaluation runs in training mode, with dropout or noise.",
        "call model.eval() before it",
        "two evaluations give the same number",
        prevented="evaluation sets eval mode",
    ),
    Fault("F46", "memorised", "S9",
        "The training memorises its rows.",
        "train for fewer epochs, or take the checkpoint of the lowest held-out loss",
        "the held-out loss stops rising",
    ),
    Fault("F47", "different-labels", "S9",
        "Training and evaluation losses are not over the same kind of tokens.",
        "build both with the same function",
        "both losses of the base agree on the same rows",
    ),
    Fault("F48", "weak-validation", "S9",
        "The held-out rows are too few to show the difference.",
        "hold more rows out: validation_size",
        "the standard error falls below the change",
    ),
    Fault("F49", "quantised-twice", "S10",
        "A checkpoint that is quantised already is asked to be quantised again.",
        "take the 16-bit checkpoint, or train without quantising",
        "the quantisation that was meant takes effect",
    ),
    Fault("F50", "compute-in-float32", "S10",
        "4-bit layers compute in float32.",
        "bnb_4bit_compute_dtype: bfloat16",
        _FASTER,
        prevented="the compute dtype follows bf16",
    ),
    Fault("F51", "not-quantised", "S10",
        "The quantisation that was asked for did not take place.",
        "pass quantization_config where the model is loaded",
        _FITS,
        prevented="modules are quantised as their weights are read",
    ),
    Fault("F52", "head-quantised", "S10",
        "The output head (or a router) is quantised too.",
        "add lm_head to llm_int8_skip_modules",
        "the base's own loss falls",
        prevented="only linears outside the head are quantised",
    ),
    Fault("F53", "fp16-overflow", "S11",
        "Activations overflow the range of float16.",
        "bf16: true",
        "losses are finite",
        prevented="there is no float16",
    ),
    Fault("F54", "updates-lost", "S11",
        "Adapters in bfloat16 round small updates away.",
        "keep the adapters in float32",
        "every element moves at each step",
        prevented="adapters are float32",
    ),
    Fault("F55", "nan-hidden", "S11",
        "The log replaces losses that are not finite.",
        "logging_nan_inf_filter: false",
        "the log shows at which step it begins",
        prevented="a non-finite loss stops the run",
    ),
    Fault("F56", "targets-missed", "S12",
        "Names in the adapter's targets match no module of this model.",
        "lora_target_modules: all-linear",
        "the count of trained parameters becomes what was meant",
        prevented="a name that matches nothing is refused",
    ),
    Fault("F57", "no-gradient", "S12",
        "Adapters get no gradient: checkpointing cuts them off.",
        "use_reentrant: false, or enable_input_require_grads()",
        _LEARNS,
        prevented="checkpointing is not reentrant",
    ),
    Fault("F58", "adapters-frozen", "S12",
        "Adapters are frozen.",
        "load the adapter with is_trainable=True",
        _LEARNS,
    ),
    Fault("F59", "adapter-not-neutral", "S12",
        "The untrained adapter changes the model already.",
        "start lora_B at zero (init_lora_weights: true)",
        "the first loss is the base's",
        prevented="lora_B starts at zero",
    ),
    Fault("F60", "adapter-all-zero", "S12",
        "Both matrices of the adapters are zero, and stay so.",
        "start lora_A at random (init_lora_weights: true)",
        _LEARNS,
        prevented="lora_A starts at random",
    ),
    Fault("F61", "scale-wrong", "S12",
        "The adapter's scale alpha / r is far from what the learning rate is meant for.",
        "lora_alpha: between r and 2 r",
        _LEARNS,
    ),
    Fault("F62", "too-little-capacity", "S12",
        "The adapter is too small for the task.",
        "lora_target_modules: all-linear, or a larger lora_r",
        "one batch can be learned by heart",
    ),
    Fault("F63", "head-adapter-ignored", "S12",
        "The adapter on the output head is passed over by a fused loss.",
        "take lm_head out of lora_target_modules",
        "every adapter that is saved was trained",
        prevented="only frozen linears within the layers can be targets",
    ),
    Fault("F64", "rate-too-low", "S13",
        "The learning rate is too low.",
        "learning_rate: 2e-4",
        _LEARNS,
    ),
    Fault("F65", "warmup-too-long", "S13",
        "The warm-up lasts longer than the run, or most of it.",
        "warmup_steps: 0, warmup_ratio: 0.03",
        _LEARNS,
    ),
    Fault("F66", "schedule-wrong-length", "S13",
        "The schedule is made for another number of steps than the run has.",
        "let the schedule end with the run",
        "the learning rate is above 0 until the last step",
        prevented="the rate is a function of the run's own steps",
    ),
    Fault("F67", "rate-too-high", "S13",
        "The learning rate is too high.",
        "learning_rate: 2e-4",
        "no jumps, and a lower loss at the end",
    ),
    Fault("F68", "clipped-to-nothing", "S13",
        "Gradients are clipped to almost nothing.",
        "max_grad_norm: 1.0",
        _LEARNS,
    ),
    Fault("F69", "decay-too-large", "S13",
        "Weight decay pulls the adapters back to zero.",
        "weight_decay: 0.0",
        _LEARNS,
    ),
    Fault("F70", "optimizer-memory", "S13",
        "The optimizer's state does not fit, or thrashes between host and card.",
        "optim: adamw_8bit",
        "the first optimizer step fits, and steps take equal time",
        prevented="the plan counts it",
    ),
    Fault("F71", "no-checkpointing", "S14",
        "Activations do not fit without gradient checkpointing.",
        "gradient_checkpointing: true",
        _FITS,
        prevented="the plan counts them",
    ),
    Fault("F72", "logits-memory", "S14",
        "The logits of the whole batch do not fit.",
        "compute the loss in chunks",
        _FITS,
        prevented="the loss is computed in chunks, and never holds all logits",
    ),
    Fault("F73", "recompiles", "S14",
        "Compiled layers are compiled anew for every length.",
        "pad to few lengths, or torch_compile: false",
        _FASTER,
        prevented="lengths are padded to few shapes",
    ),
    Fault("F74", "accumulation-scaled", "S14",
        "The loss of accumulated micro-batches is not divided as it should be.",
        "divide the sum over the whole batch by its learned tokens, once",
        "1 x N rows and N x 1 rows give the same gradient",
        prevented="the step's loss is one weighted mean over its tokens",
    ),
    Fault("F75", "empty-adapter", "S15",
        "The saved adapter is empty or was never trained.",
        "save after the training",
        _EFFECT,
    ),
    Fault("F76", "merged-into-other-base", "S15",
        "The adapter was merged into other weights than it was trained on.",
        "merge into the weights it was trained on, in 16 bits, and compare the logits",
        "merged and unmerged model give the same logits",
    ),
    Fault("F77", "resumed-without-state", "S15",
        "The run was resumed without its optimizer, schedule or place in the data.",
        "resume from a whole checkpoint",
        "loss and learning rate go on without a jump",
        prevented="a checkpoint holds all of it, and is checked before it is continued",
    ),
    Fault("F78", "adapter-not-loaded", "S15",
        "The adapter does not belong to the model that it is loaded into.",
        "load it strictly, on the base and revision of adapter_config.json",
        _EFFECT,
        prevented="adapters load strictly",
    ),
)  # fmt: skip

FAULTS: dict[str, Fault] = {fault.code: fault for fault in _FAULTS}

EQUIVALENT: tuple[frozenset[str], ...] = (
    frozenset({"F61", "F64"}),  # a small step is a small rate or a small scale: only their product acts
    frozenset({"F61", "F67"}),  # and a large one likewise
    frozenset({"F10", "F24"}),  # where every answer is cut, no row has an end
    frozenset({"F18", "F21"}),  # where only the mask is seen
    frozenset({"F57", "F58"}),  # where nothing but adapters is trained
)
"""Faults that share their evidence in some cases; they are named together unless something tells them apart."""

_UNMOVED = frozenset({"F54", "F57", "F58", "F60", "F62", "F64", "F75"})  # what an adapter without gradient looks like
_NO_LABELS = frozenset({"F10", "F14", "F17", "F19", "F55"}) | _UNMOVED

EXPLAINS: dict[str, frozenset[str]] = {
    "F02": frozenset({"F03", "F24", "F25"}),  # the length that was meant is not the one that held
    "F04": frozenset({"F05", "F08", "F09", "F10", "F12", "F14"}),  # every id means something else
    "F07": frozenset({"F10", "F12", "F14"}),  # an end of turn that is no token
    "F10": frozenset({"F14", "F17", "F19"}),  # what is not there cannot be learned or stopped at
    "F12": frozenset({"F08", "F09", "F10", "F11", "F14", "F16"}),  # of a format that is not the model's
    "F15": frozenset({"F11"}),  # it begins otherwise
    "F16": frozenset({"F11"}),
    "F18": frozenset({"F20"}) | _UNMOVED,  # a mask of ones, or of zeros
    "F20": frozenset({"F15", "F30"}),  # headers are learned with everything else
    "F21": _NO_LABELS,
    "F22": frozenset({"F10", "F17", "F19", "F64"}),  # other tokens than the row's are learned
    "F23": frozenset({"F10", "F14", "F15", "F17", "F19", "F20"}),  # ends of the user's turns
    "F25": frozenset({"F21", "F24"}) | _NO_LABELS,  # what is cut off is not masked
    # what stands before the answer is not there; and rows that begin anywhere are found in the midst of others
    "F26": frozenset({"F09", "F12", "F13", "F16", "F21", "F31", "F38"}),
    "F28": frozenset({"F27"}),  # pads that are seen also move the positions
    "F29": frozenset({"F17", "F20", "F30"}),
    "F31": frozenset({"F32"}),
    "F35": frozenset({"F38", "F39"}),  # one answer belongs to every prompt alike
    "F36": frozenset({"F10", "F12", "F15", "F16", "F23"}),  # turns of other roles have no header of the template's
    "F37": frozenset({"F04", "F12"}),  # garbled text is unlikely to every model
    "F39": frozenset({"F46"}),
    "F43": frozenset({"F44", "F46"}),  # a part of all
    "F51": frozenset({"F50"}),
    "F53": frozenset({"F55", "F67"}),
    "F54": frozenset({"F64"}),
    "F56": frozenset({"F62"}),
    "F57": _UNMOVED - {"F57", "F58"},
    "F58": _UNMOVED - {"F58"},
    "F60": _UNMOVED - {"F57", "F58", "F60"},
    "F65": frozenset({"F64"}),
    "F66": frozenset({"F54", "F64"}),
    "F68": frozenset({"F54", "F64"}),
    "F78": frozenset({"F04", "F05"}),  # the tokenizer beside the adapter is that of its own base
}
"""A fault -> others that follow from it, and would only hide the cause."""

UNLISTED: dict[str, frozenset[str]] = {
    cause: EXPLAINS[cause] & effects
    for cause, effects in {
        "F07": {"F10"},
        "F20": {"F15"},
        "F23": {"F10", "F15", "F17", "F19"},
        "F43": {"F44"},
    }.items()
}
"""Those of `EXPLAINS` that data.json leaves out beside their cause; the others are listed."""

ALIASES = {"hidden-characters": "F37", "no-held-out-rows": "F43"}
"""Slugs of findings that are a fault's second form."""


def find(word: str) -> str:
    """The code that a code, a slug or a suspect's number means: `f17`, `pad-masks-terminator`, `S4`.

    Raises:
        InputError: it names none; the nearest ones are in the message.
    """
    wanted = word.strip()
    by_name = {**{fault.slug: fault.code for fault in _FAULTS}, **ALIASES}
    code = wanted.upper()
    if re.fullmatch(r"F\d", code):
        code = f"F0{code[1:]}"
    if code in FAULTS or code in SUSPECTS:
        return code
    name = wanted.lower().replace("_", "-")
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
    near += [code for code in difflib.get_close_matches(code, [*FAULTS, *SUSPECTS], n=3, cutoff=0.6) if not near]
    raise InputError(
        "there is no such fault",
        seen=word,
        allowed="F01 to F78, S1 to S15, or a fault's name",
        change=f"did you mean {', '.join(near)}?" if near else "docs/faults.md lists them",
    )


def equivalents(code: str) -> set[str]:
    """The codes whose evidence can be that of this one, itself left out."""
    return set().union(*(group for group in EQUIVALENT if code in group)) - {code}
