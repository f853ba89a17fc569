"""The catalogue: fifteen suspects, their 81 faults, and which faults have the same evidence.

A *suspect* is a part of fine-tuning that the user sets up; a *fault* is one way in which it is wrong. Codes are for
programs and never change their meaning; slugs are for people.

    FAULTS["F17"].slug, .suspect, .title, .fix, .expect
    find("F17")  find("pad-masks-terminator")  find("S4")

Symptoms, look-alikes and sources of a fault are in the docstring of its rule (`rules`), which `solotune explain`
prints. The entry here has the short texts: `title` is the cause, `fix` what to change if no rule gives a more exact
line, `expect` what is seen after the fix.

`prevented` says why a run of solotune itself cannot have the fault. Its rule is for runs of other tools, and checks
solotune's own code too.

The file is long because it is one table.
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
    "S10": "quantization",
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
    expect: str  # what is seen after the fix
    prevented: str = ""  # why a run of solotune cannot have it

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "slug": self.slug, "suspect": self.suspect, "title": self.title}


_STOPS = "answers end where they should"
_FIRST_LOSS = "the first loss falls to the loss of the same rows in the model's own format"
_LEARNS = "the loss leaves its plateau within the first tens of steps"
_FASTER = "each step takes less time; the losses stay the same"
_FITS = "peak memory falls below the GPU's memory; the losses stay the same"
_EFFECT = "the answers of the tuned model differ from those of the base"
_HONEST = "the held-out loss is higher, and can be trusted"

_FAULTS = (
    Fault("F01", "binary-mismatch", "S1",
        "bitsandbytes has no binary for the CUDA version of this torch.",
        "install a bitsandbytes version with a binary for this CUDA version, and unset BNB_CUDA_VERSION",
        "4-bit layers load and compute",
    ),
    Fault("F02", "renamed-argument", "S1",
        "A setting has a name that this version does not read, so the default was used instead.",
        "use the name of the installed version, and check the value in the trainer's arguments",
        "the setting takes effect",
        prevented="unknown keys are refused, and the message gives the right name",
    ),
    Fault("F03", "changed-default", "S1",
        "A setting was left out, and this version's default is not the one that the recipe assumes.",
        "set every value that matters: learning_rate, bf16, gradient_checkpointing, max_length",
        "memory and speed of learning match the recipe",
        prevented="all defaults are saved in the run's config.yaml",
    ),
    Fault("F04", "wrong-tokenizer", "S2",
        "The tokenizer is not the one that the model was trained with.",
        "load tokenizer and model from the same folder and revision",
        "the loss on plain text becomes normal",
    ),
    Fault("F05", "ids-beyond-embedding", "S2",
        "Token ids do not match the rows of the embedding.",
        "resize the embedding to its own size or the tokenizer's, whichever is larger, or use the original tokenizer",
        "no index error, and no token uses the embedding of another",
    ),
    Fault("F06", "untrained-embedding", "S2",
        "The data uses tokens whose embedding rows were never trained.",
        "use tokens that the base model knows, or train these rows with PEFT "
        "(trainable_token_indices or modules_to_save)",
        "the loss on these tokens falls like the loss on other tokens",
    ),
    Fault("F07", "markers-as-text", "S2",
        "The tokenizer splits the template's control tokens like ordinary text.",
        "use the template that belongs to the tokenizer, or add its control tokens to the tokenizer as special tokens",
        _FIRST_LOSS,
    ),
    Fault("F08", "double-bos", "S3",
        "Rows begin with two begin-of-text tokens.",
        "tokenize rendered text with add_special_tokens=False",
        "training and serving use the same first tokens",
    ),
    Fault("F09", "missing-bos", "S3",
        "Rows lack the begin-of-text token that the model expects.",
        "use the model's own chat template, which writes it",
        "the first loss falls a little; serving matches training",
    ),
    Fault("F10", "terminator-missing", "S3",
        "The answers in the training rows have no end-of-turn token.",
        "end answers with the template's end-of-turn token",
        _STOPS,
    ),
    Fault("F11", "template-differs", "S3",
        "The model is served with a different chat template than it was trained with.",
        "serve with the chat template that was saved with the adapter",
        "answers become as good as in the evaluation",
        prevented="training and serving use the same rendering code, and the template is saved with the adapter",
    ),
    Fault("F12", "not-through-chat-template", "S3",
        "The rows are not in the model's chat format.",
        "give the data as a messages column, so that the model's own template is applied",
        _FIRST_LOSS,
    ),
    Fault("F13", "role-dropped", "S3",
        "The template silently leaves out the messages of one role.",
        "move these messages into the user's, in training and in serving",
        "the model sees its instructions",
    ),
    Fault("F14", "stops-elsewhere", "S3",
        "Generation stops at a different token than the one that ends the answers.",
        "add the end-of-turn token to eos_token_id in generation_config.json",
        _STOPS,
    ),
    Fault("F15", "header-learned", "S3",
        "The role header before the answer is missing, doubled, or trained on as part of the answer.",
        "render prompts with add_generation_prompt, and start the loss after the header",
        "answers begin with their first word",
    ),
    Fault("F16", "prompt-is-no-prefix", "S3",
        "The prompt's tokens are not the first tokens of the row.",
        "end the prompt at a token boundary, and render earlier turns in the same way in both",
        "in training, the answer follows the same tokens as in serving",
    ),
    Fault("F17", "pad-masks-terminator", "S4",
        "Masking the padding also masks the end of the answers: both are the same token.",
        "set a pad_token other than eos, or mask padding by position",
        _STOPS,
        prevented="padding is masked by position, never by id",
    ),
    Fault("F18", "no-generation-markers", "S4",
        "The template has no generation markers, so the assistant mask is empty.",
        "use a chat template with {% generation %} markers",
        "some tokens of each row count in the loss, not none and not all",
        prevented="masks are made without markers; a row that cannot be masked is an error",
    ),
    Fault("F19", "terminator-masked", "S4",
        "The end-of-turn token is masked, so the model is not trained to stop.",
        "close the generation block after the end-of-turn token",
        _STOPS,
    ),
    Fault("F20", "prompt-learned", "S4",
        "The loss includes the prompts, although only answers should count.",
        "use the assistant mask: assistant_only_loss: true",
        "the loss is that of the answers only",
    ),
    Fault("F21", "nothing-learned", "S4",
        "Every token is masked: the start of the answer was not found in the tokens.",
        "mask by the template's offsets, or give the answer marker as it is tokenized inside a row",
        "the loss is no longer 0 or NaN",
    ),
    Fault("F22", "labels-shifted", "S4",
        "Labels are shifted twice: once in the data and once by the model.",
        "pass labels = input_ids; the model shifts them itself",
        "the first loss falls to that of the base, and answers no longer skip tokens",
        prevented="rows store a mask and no labels, so labels cannot be shifted",
    ),
    Fault("F23", "mask-inverted", "S4",
        "The mask is inverted: the prompts are trained on and the answers are not.",
        "invert the mask",
        "the model answers instead of asking",
    ),
    Fault("F24", "answers-cut", "S5",
        "Long answers are truncated at max_length.",
        "raise max_length, or drop longer rows",
        _STOPS,
    ),
    Fault("F25", "prompt-fills-window", "S5",
        "Prompts fill max_length, so nothing of the answer is left to train on.",
        "raise max_length",
        "no rows are lost, and the loss is no longer 0 or NaN",
    ),
    Fault("F26", "prompt-cut", "S5",
        "Long rows are truncated at the start, so the answer has no question.",
        "truncate at the end (in TRL: truncation_mode: keep_start), or drop longer rows",
        "the first loss falls",
        prevented="truncation keeps the start",
    ),
    Fault("F27", "left-padding-positions", "S6",
        "Left padding shifts the positions of a model with absolute positions.",
        "pad on the right, or pass position_ids that start at the first real token",
        "a row has the same loss alone and padded",
        prevented="rows are padded on the right",
    ),
    Fault("F28", "pads-attended", "S6",
        "Attention sees the padding: the attention mask is missing or wrong.",
        "pass an attention_mask that is 0 at padding",
        "a row has the same loss alone and padded",
        prevented="rows are padded on the right, which causal attention never sees",
    ),
    Fault("F29", "padding-learned", "S6",
        "The loss includes padding.",
        "set labels to -100 where attention_mask is 0",
        "the loss rises to that of the real tokens",
        prevented="padding is masked by position",
    ),
    Fault("F30", "learned-from-pad", "S6",
        "With left padding, the model is trained to predict the first real token from padding.",
        "pad on the right",
        "the number of loss tokens no longer depends on the padding",
        prevented="rows are padded on the right",
    ),
    Fault("F31", "packed-rows-mix", "S7",
        "Packed rows attend to each other.",
        "restart position_ids at each row, pass no attention_mask, and set use_cache=False",
        "a row has the same loss alone and packed",
        prevented="checked on the model before the run",
    ),
    Fault("F32", "positions-not-reset", "S7",
        "Positions do not restart at each packed row.",
        "restart position_ids at each row",
        "a row has the same loss alone and packed",
        prevented="checked before the run",
    ),
    Fault("F33", "packing-loses-rows", "S7",
        "Packing truncates or drops rows.",
        "raise max_length, or split long rows instead of truncating them",
        "the number of loss tokens equals that of the data",
        prevented="packing keeps rows whole, and the report says how full the packs are",
    ),
    Fault("F34", "empty-answers", "S8",
        "Answers are empty.",
        "remove these rows",
        "answers are no longer empty",
    ),
    Fault("F35", "constant-answers", "S8",
        "Nearly all answers are the same.",
        "remove or rebalance the repeated answer",
        "answers depend on the question",
    ),
    Fault("F36", "broken-turns", "S8",
        "Roles have wrong names or do not alternate.",
        "rename the roles to system, user and assistant",
        "every answer is found, after a header that the model knows",
    ),
    Fault("F37", "bad-encoding", "S8",
        "The text was decoded with the wrong encoding.",
        "decode it again: text.encode('latin-1').decode('utf-8')",
        "the first loss falls; answers have no odd characters",
    ),
    Fault("F38", "misaligned-answers", "S8",
        "Answers do not belong to their prompts.",
        "join prompts and answers again by their key",
        "the right prompt lowers the loss of its answer again",
    ),
    Fault("F39", "duplicates", "S8",
        "The same rows are in the data many times.",
        "remove duplicates before the split",
        "the loss no longer falls in steps at each repeat",
    ),
    Fault("F40", "sorted-rows", "S8",
        "The rows are sorted, and are trained on in that order.",
        "shuffle the training rows",
        "the loss no longer follows the position in the file",
        prevented="every epoch is shuffled again",
    ),
    Fault("F41", "repeated-by-workers", "S8",
        "Every data loader worker reads all of the data.",
        "shard the dataset by worker",
        "each row is used once per epoch",
        prevented="there are no workers",
    ),
    Fault("F42", "long-tail", "S8",
        "A few very long rows set the peak memory, and may come late in the run.",
        "lower max_length, and try the longest batch first",
        "no out-of-memory error late in the run",
        prevented="the largest step is planned, and tried before the run",
    ),
    Fault("F43", "evaluated-on-training", "S9",
        "The evaluation rows are training rows.",
        "hold rows out: validation_size: 0.05",
        _HONEST,
    ),
    Fault("F44", "leaked-passages", "S9",
        "Held-out rows have copies or near-copies in the training rows.",
        "remove duplicates first, and split by group: split_by",
        _HONEST,
    ),
    Fault("F45", "evaluated-in-training-mode", "S9",
        "The evaluation runs in training mode, with dropout or noise.",
        "call model.eval() before the evaluation",
        "two evaluations give the same number",
        prevented="the evaluation sets eval mode",
    ),
    Fault("F46", "memorised", "S9",
        "The model memorises its training rows (overfitting).",
        "train for fewer epochs, or use the checkpoint with the lowest held-out loss",
        "the held-out loss no longer rises",
    ),
    Fault("F47", "different-labels", "S9",
        "The training loss and the held-out loss count different kinds of tokens.",
        "build the labels of both with the same function",
        "both losses agree for the base model on the same rows",
    ),
    Fault("F48", "weak-validation", "S9",
        "There are too few held-out rows to show the difference.",
        "hold more rows out: validation_size",
        "the standard error is smaller than the change",
    ),
    Fault("F49", "quantised-twice", "S10",
        "A checkpoint that is already quantized is quantized again.",
        "use the 16-bit checkpoint, or train without quantizing",
        "the quantization in the config takes effect",
    ),
    Fault("F50", "compute-in-float32", "S10",
        "4-bit layers compute in float32.",
        "bnb_4bit_compute_dtype: bfloat16",
        _FASTER,
        prevented="the compute dtype follows bf16",
    ),
    Fault("F51", "not-quantised", "S10",
        "The base should be quantized, but is not.",
        "pass quantization_config where the model is loaded",
        _FITS,
        prevented="modules are quantized as their weights are read",
    ),
    Fault("F52", "head-quantised", "S10",
        "The output head (or a router) is quantized too.",
        "add lm_head to llm_int8_skip_modules",
        "the loss of the base itself falls",
        prevented="the output head is never quantized",
    ),
    Fault("F53", "fp16-overflow", "S11",
        "Activations overflow the range of float16.",
        "bf16: true",
        "losses are finite",
        prevented="there is no float16",
    ),
    Fault("F54", "updates-lost", "S11",
        "Small updates are lost by rounding, because the adapters are bfloat16.",
        "keep the adapters in float32",
        "every element changes at each step",
        prevented="adapters are float32",
    ),
    Fault("F55", "nan-hidden", "S11",
        "The log hides losses that are not finite.",
        "logging_nan_inf_filter: false (transformers)",
        "the log shows the step at which it begins",
        prevented="a non-finite loss stops the run",
    ),
    Fault("F56", "targets-missed", "S12",
        "Some names in lora_target_modules match no module of this model.",
        "lora_target_modules: all-linear",
        "the number of trainable parameters is as intended",
        prevented="a name that matches nothing is refused",
    ),
    Fault("F57", "no-gradient", "S12",
        "The adapters get no gradient, because gradient checkpointing cuts them off.",
        "use_reentrant: false, or enable_input_require_grads() (transformers)",
        _LEARNS,
        prevented="checkpointing is never reentrant",
    ),
    Fault("F58", "adapters-frozen", "S12",
        "The adapters are frozen.",
        "load the adapter with is_trainable=True (PEFT)",
        _LEARNS,
    ),
    Fault("F59", "adapter-not-neutral", "S12",
        "The untrained adapter already changes the model.",
        "start lora_B at zero (in PEFT: init_lora_weights: true)",
        "the first loss is that of the base",
        prevented="lora_B starts at zero",
    ),
    Fault("F60", "adapter-all-zero", "S12",
        "Both matrices of the adapters are zero, and stay zero.",
        "start lora_A with random values (in PEFT: init_lora_weights: true)",
        _LEARNS,
        prevented="lora_A starts with random values",
    ),
    Fault("F61", "scale-wrong", "S12",
        "The adapter's scale alpha / r does not suit the learning rate.",
        "lora_alpha: between lora_r and 2 x lora_r",
        _LEARNS,
    ),
    Fault("F62", "too-little-capacity", "S12",
        "The adapter is too small for the task.",
        "lora_target_modules: all-linear, or a larger lora_r",
        "the model can overfit one batch",
    ),
    Fault("F63", "head-adapter-ignored", "S12",
        "A fused loss ignores the adapter on the output head.",
        "remove lm_head from lora_target_modules",
        "every saved adapter was trained",
        prevented="only linear layers inside the decoder layers can be targets",
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
        "The learning-rate schedule is made for a different number of steps than the run has.",
        "make the schedule end with the run",
        "the learning rate stays above 0 until the last step",
        prevented="the schedule is computed from the run's own steps",
    ),
    Fault("F67", "rate-too-high", "S13",
        "The learning rate is too high.",
        "learning_rate: 2e-4",
        "no jumps, and a lower loss at the end",
    ),
    Fault("F68", "clipped-to-nothing", "S13",
        "Gradients are clipped to almost zero.",
        "max_grad_norm: 1.0",
        _LEARNS,
    ),
    Fault("F69", "decay-too-large", "S13",
        "Weight decay pulls the adapters back to zero.",
        "weight_decay: 0.0",
        _LEARNS,
    ),
    Fault("F70", "optimizer-memory", "S13",
        "The optimizer state does not fit into GPU memory, or moves between host and GPU all the time.",
        "optim: adamw_8bit",
        "the first optimizer step fits, and all steps take the same time",
        prevented="the plan counts the optimizer state",
    ),
    Fault("F71", "no-checkpointing", "S14",
        "Activations do not fit without gradient checkpointing.",
        "gradient_checkpointing: true",
        _FITS,
        prevented="the plan counts activations",
    ),
    Fault("F72", "logits-memory", "S14",
        "The logits of the whole batch do not fit.",
        "compute the loss in chunks (in TRL: use_liger_kernel: true)",
        _FITS,
        prevented="the loss is computed in chunks, so all logits never exist at once",
    ),
    Fault("F73", "recompiles", "S14",
        "Compiled layers are compiled again for every new length.",
        "pad to a few lengths, or torch_compile: false",
        _FASTER,
        prevented="rows are padded to a few lengths",
    ),
    Fault("F74", "accumulation-scaled", "S14",
        "With gradient accumulation, the loss is divided by the wrong number.",
        "divide the sum over the whole batch by its loss tokens, once",
        "1 x N rows and N x 1 rows give the same gradient",
        prevented="the loss of a step is one weighted mean over its tokens",
    ),
    Fault("F75", "empty-adapter", "S15",
        "The saved adapter is empty or was never trained.",
        "save the adapter after training",
        _EFFECT,
    ),
    Fault("F76", "merged-into-other-base", "S15",
        "The adapter was merged into different weights than it was trained on.",
        "merge into the weights it was trained on, in 16 bits, and compare the logits",
        "the merged model and base with adapter give the same logits",
    ),
    Fault("F77", "resumed-without-state", "S15",
        "The run was resumed without its optimizer, schedule or position in the data.",
        "resume from a complete checkpoint",
        "loss and learning rate continue without a jump",
        prevented="a checkpoint has all of it, and is checked before the run continues",
    ),
    Fault("F78", "adapter-not-loaded", "S15",
        "The adapter does not belong to the model that it is loaded into.",
        "load it strictly, on the base model and revision named in adapter_config.json",
        _EFFECT,
        prevented="adapters are loaded strictly",
    ),
    Fault("F79", "ranks-differ", "S14",
        "The ranks (GPUs) of the run do not train the same adapter: their gradients are not averaged.",
        "start all ranks with the same adapter, and average the gradients over the ranks in every step",
        "after every step, the adapter has the same norm on every rank",
        prevented="one vector holds all gradients and is summed over the ranks in every step",
    ),
    Fault("F80", "ranks-scaled", "S14",
        "With several GPUs, the loss is divided by the wrong number.",
        "divide by the loss tokens of all ranks",
        "N ranks with one row each and one rank with N rows give the same gradient",
        prevented="the loss of a step is one weighted mean over the tokens of all ranks",
    ),
    Fault("F81", "resumed-with-other-batch", "S15",
        "The run was resumed with another number of GPUs, and so with another global batch.",
        "keep GPUs x per_device_train_batch_size x gradient_accumulation_steps as it was",
        "an epoch has as many steps after the resume as before",
        prevented="a run is continued with as many rows in a step as before, or not at all",
    ),
)  # fmt: skip

FAULTS: dict[str, Fault] = {fault.code: fault for fault in _FAULTS}

EQUIVALENT: tuple[frozenset[str], ...] = (
    frozenset({"F61", "F64"}),  # a small step is a small rate or a small scale: only the product matters
    frozenset({"F61", "F67"}),  # and a large step likewise
    frozenset({"F10", "F24"}),  # if every answer is truncated, no row has an end
    frozenset({"F18", "F21"}),  # if only the mask is known
    frozenset({"F57", "F58"}),  # if only adapters are trained
)
"""Faults that can have the same evidence; they are reported together unless something tells them apart."""

_UNMOVED = frozenset({"F54", "F57", "F58", "F60", "F62", "F64", "F75"})  # how an adapter without gradient looks
_NO_LABELS = frozenset({"F10", "F14", "F17", "F19", "F55"}) | _UNMOVED

EXPLAINS: dict[str, frozenset[str]] = {
    "F02": frozenset({"F03", "F24", "F25"}),  # the intended length was not used
    # every id means something else
    "F04": frozenset({"F05", "F06", "F07", "F08", "F09", "F10", "F11", "F12", "F14", "F15", "F16", "F38"}),
    "F07": frozenset({"F10", "F12", "F14"}),  # an end of turn that is not a token
    "F10": frozenset({"F14", "F17", "F19"}),  # a missing end can be neither trained on nor stopped at
    "F12": frozenset({"F08", "F09", "F10", "F11", "F14", "F16"}),  # the rows are in another format
    "F15": frozenset({"F11"}),  # the answer begins differently
    "F16": frozenset({"F11"}),
    "F18": frozenset({"F20", "F21"}) | _UNMOVED,  # a mask of ones, or of zeros
    "F20": frozenset({"F15", "F30"}),  # headers are trained on like everything else
    "F21": _NO_LABELS,
    "F22": frozenset({"F10", "F17", "F19", "F59", "F64"}),  # other tokens than the row's are trained on
    "F23": frozenset({"F10", "F14", "F15", "F17", "F19", "F20", "F59"}),  # the ends are those of the user's turns
    "F25": frozenset({"F21", "F24"}) | _NO_LABELS,  # truncated tokens are not masked
    # the text before the answer is missing; and rows that begin anywhere are found inside other rows
    "F26": frozenset({"F09", "F12", "F13", "F16", "F21", "F31", "F38"}),
    "F28": frozenset({"F27"}),  # attended padding also moves the positions
    "F29": frozenset({"F17", "F20", "F30"}),
    "F31": frozenset({"F32"}),
    "F35": frozenset({"F38", "F39"}),  # one answer belongs to every prompt
    "F36": frozenset({"F10", "F12", "F15", "F16", "F23"}),  # the template has no header for other roles
    "F37": frozenset({"F04", "F12"}),  # garbled text is unlikely to every model
    "F39": frozenset({"F46"}),
    "F43": frozenset({"F44", "F46"}),  # some rows instead of all
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
    "F78": frozenset({"F04", "F05"}),  # the tokenizer saved with the adapter is that of its own base
    "F79": frozenset({"F57", "F58", "F75"}),  # the adapter of a rank that gets no gradient
    "F81": frozenset({"F66", "F77"}),  # the schedule is computed again for another number of steps
}
"""Fault -> faults that follow from it, which would only hide the cause."""

UNLISTED: dict[str, frozenset[str]] = {
    cause: EXPLAINS[cause] & effects
    for cause, effects in {
        "F07": {"F10"},
        "F20": {"F15"},
        "F23": {"F10", "F15", "F17", "F19"},
        "F43": {"F44"},
    }.items()
}
"""The part of `EXPLAINS` that data.json leaves out if the cause is listed."""

ALIASES = {
    "hidden-characters": "F37",
    "no-held-out-rows": "F43",
    "thoughts-dropped": "F13",
    "already-rendered": "F12",
}
"""Slugs of findings that are a fault's second form."""


def find(word: str) -> str:
    """Resolve a code, a slug or a suspect's number to a code: `f17`, `pad-masks-terminator`, `S4`.

    Raises:
        InputError: there is no such fault; the message gives the nearest names.
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
        allowed="F01 to F81, S1 to S15, or a fault's name",
        change=f"did you mean {', '.join(near)}?" if near else "`solotune explain S4` lists the faults of suspect S4",
    )


def equivalents(code: str) -> set[str]:
    """The other codes that can have the same evidence."""
    return set().union(*(group for group in EQUIVALENT if code in group)) - {code}
