"""Which of our faults a peer's warning may mean: one table a peer, generous where a warning leaves it open.

A key is the peer's own name of the check, with the word of its title behind it where one check has several; a pattern
with `*` at its end fits all names that begin so. A warning that is in no table is advice: it means none of
our faults (no limit of checkpoints, no evaluation, a batch above the usual).
"""

from __future__ import annotations

NOT_LEARNING = ("F21", "F22", "F38", "F54", "F57", "F58", "F60", "F61", "F64", "F65", "F68", "F75")
"""Of a flat loss with the usual list: frozen, no gradient, rate too low or zero, warm-up, labels misaligned."""
DIVERGED = ("F53", "F55", "F61", "F67")
MEMORY = ("F42", "F50", "F70", "F71", "F72")

RUNMEDIC = {
    "non_finite": (*DIVERGED, "F54"),
    "divergence": ("F40", "F61", "F67", "F74", "F77"),
    "loss_spikes": ("F40", "F42", "F61", "F67", "F74", "F77"),
    "no_learning": NOT_LEARNING,
    "overfitting": ("F46",),
    "val_below_train": ("F43", "F44", "F45", "F47", "F74"),
    "grad_spikes": ("F61", "F67", "F77"),
    "constant_lr_plateau": ("F62", "F66"),
    "slow_steps": ("F73",),
    "slowdown": ("F73",),
    "memory_growth": ("F42",),
    "log:cuda_oom": MEMORY,
    "log:amp_overflow": ("F53", "F55"),
    "log:anomaly_nan": ("F53", "F55"),
}

FINETUNE_DOCTOR = {
    "overfitting": ("F46",),
    "stopped_improving": ("F46", "F62", "F66"),
    "loss_degenerate/NaN loss": DIVERGED,
    "loss_degenerate/Loss is exactly zero": ("F18", "F21", "F25", "F55"),
    "not_learning": (*NOT_LEARNING, "F67"),
    "loss_spikes": ("F40", "F42", "F46", "F61", "F67", "F74", "F77"),
    "lr_schedule": ("F65", "F66"),
    "gradients/NaN gradients": DIVERGED,
    "gradients/Zero gradients": ("F18", "F21", "F57", "F58", "F60", "F68"),
    "gradients/Gradient spikes": ("F61", "F67"),
    "eval_below_train": ("F43", "F44", "F45", "F47", "F74"),
    "incomplete": (),
}

SOUP = {
    # soup data doctor
    "chat_template": ("F12", "F18"),
    "template_render": ("F12", "F13", "F36"),
    "generation_markers": ("F18", "F19", "F20"),
    "eos_in_labels": ("F10", "F14", "F17", "F19"),
    "bos_duplication": ("F08",),
    "system_role": ("F13",),
    "unknown_roles": ("F36",),
    "truncation_risk": ("F24", "F25", "F26", "F33", "F42"),
    # soup data validate
    "validate/duplicate rows": ("F39", "F41"),
    "validate/empty fields": ("F34",),
    "validate/very short": ("F34",),
    "validate/fail to convert": ("F12", "F34", "F36"),
    # soup why
    "nan_loss": DIVERGED,
    "loss_flat": NOT_LEARNING,
    "loss_diverged": ("F61", "F67", "F74", "F77"),
    "grad_norm_high": ("F61", "F67", "F74"),
    "lr_too_low": ("F64", "F03"),
    "lr_too_high": ("F67",),
    # soup diagnose
    "forgetting": ("F67", "F61"),
    "mode_collapse": ("F35", "F46", "F67"),
    "memorization": ("F46",),
    "contamination": ("F43", "F44"),
    "format": ("F10", "F12"),
}

PEFT_DOCTOR = {
    # check: the data
    "dataset.empty": ("F34",),
    "dataset.empty_rows": ("F34",),
    "dataset.duplicates": ("F35", "F39", "F41"),
    "dataset.short_responses": ("F34",),
    "dataset.bad_text_artifacts": ("F37",),
    "dataset.chat_missing_assistant": ("F36", "F34"),
    "dataset.empty_assistant_messages": ("F34",),
    "dataset.unknown_chat_roles": ("F36",),
    "dataset.labels_all_ignored": ("F18", "F21", "F25"),
    "dataset.label_length_mismatch": ("F22",),
    "dataset.pad_token_in_labels": ("F29", "F17"),
    "dataset.long_rows": ("F24", "F25", "F26", "F33", "F42"),
    "dataset.response_template_missing": ("F21",),
    "dataset.packing_*": ("F10", "F31", "F32"),
    "dataset.train_eval_overlap": ("F43", "F44"),
    "dataset.chat_template_missing": ("F12",),
    "dataset.prompt_format_unclear": ("F12", "F36"),
    "dataset.assistant_loss_without_chat": ("F18", "F20", "F21"),
    "dataset.completion_loss_without_template": ("F20", "F21"),
    "dataset.multi_turn_without_assistant_loss": ("F20",),
    "dataset_intel.duplicate*": ("F39", "F41"),
    "dataset_intel.empty*": ("F34",),
    "dataset_intel.assistant_only*": ("F36",),
    "dataset_intel.malformed*": ("F36", "F37"),
    "dataset_intel.repeated*": ("F35", "F39"),
    "dataset_intel.encoding*": ("F37",),
    # check: the tokenizer and the model
    "tokenizer.pad_token_missing": ("F17", "F29"),
    "tokenizer.eos_token_missing": ("F10", "F14"),
    "tokenizer.pad_equals_eos_loss_masking": ("F17",),
    "tokenizer.chat_template_no_generation_block": ("F18",),
    "tokenizer.left_padding_*": ("F27", "F28", "F30"),
    "model.embedding_resize_needed": ("F05", "F06"),
    "model.modules_to_save_missing_for_tokens": ("F05", "F06"),
    "model.sequence_exceeds_context": ("F42",),
    # check: the numbers
    "training.quantization_flags_conflict": ("F49", "F51"),
    "training.precision_flags_conflict": ("F53",),
    "training.fp16_without_bf16": ("F53",),
    "training.lr_extreme": ("F67",),
    "training.lr_high": ("F67",),
    "training.full_finetune_lr": ("F67",),
    "training.epochs_high": ("F46",),
    "training.completion_loss_template_missing": ("F20", "F21"),
    "training.reentrant_checkpointing": ("F57",),
    "training.quantized_optimizer": ("F70",),
    "training.torch_compile_*": ("F73",),
    "peft.rank_low": ("F62",),
    "peft.rank_high": ("F46", "F61"),
    "peft.alpha_*": ("F61",),
    "peft.risky_target_modules": ("F63",),
    "peft.init_lora_weights_false": ("F59",),
    "peft.inference_mode_enabled": ("F58",),
    "targets.missing": ("F56",),
    "targets.not_configured": ("F56",),
    "fix.python.target_modules*": ("F56", "F63"),
    # the other commands
    "labels.length_mismatch": ("F22",),
    "labels.all_ignored": ("F18", "F21", "F25"),
    "labels.pad_unmasked": ("F29", "F17"),
    "labels.no_masking": ("F20", "F23", "F29"),
    "leakage.*": ("F43", "F44"),
    "conflicts.*": ("F38",),
    "sft.loss_modes_conflict": ("F20",),
    "sft.assistant_loss_dataset": ("F18", "F20", "F21"),
    "sft.completion_loss_dataset": ("F20", "F21"),
    "sft.generation_markers_missing": ("F18", "F19"),
    "sft.padding_free_attention": ("F31",),
    "sft.wrapped*": ("F31", "F33"),
    "chat_template.missing": ("F12", "F18"),
    "chat_template.generation_*": ("F18", "F19"),
    "chat_template.role_*": ("F13", "F36"),
    "chat_template.messages_missing": ("F12",),
    "lora.rank": ("F62", "F61"),
    "lora.alpha": ("F61",),
    "lora.risky_targets": ("F63",),
    "lora.init_mode": ("F59",),
    "lora.targets_missing": ("F56",),
    "lora.weight_tying_review": ("F06", "F63"),
    "quantization.mode_conflict": ("F49", "F51"),
    "quantization.compute_dtype_missing": ("F50",),
    "quantization.nf4": ("F51",),
    "generation.eos_*": ("F14",),
    "generation.pad_*": ("F17", "F14"),
    "generation.config_missing": ("F14",),
    "tokens.profile": ("F24", "F25", "F26", "F33", "F42"),
    "integrity.base_model_missing": (),
    "integrity.*": ("F75", "F78"),
    "adapter_tensors.*": ("F75",),
    "adapter_merge.base_*": ("F76", "F78"),
    "adapter_merge.quantized_merge_risky": ("F76",),
    "adapter_merge.weights_missing": ("F75",),
    "checkpoint.weights_*": ("F75",),
    "checkpoint.adapter_config_missing": ("F78",),
    "checkpoint.*": ("F77",),
    "resume.*": ("F77",),
    "checkpoint_list.no_valid": ("F75", "F77"),
    "investigate.empty_to_loss": ("F34",),
    "investigate.masked_to_loss": ("F18", "F21", "F25"),
    "investigate.precision_conflict": ("F53",),
    "log.cuda_oom": MEMORY,
    "log.overflow": ("F53", "F55"),
    "log.shape_mismatch": ("F05", "F56", "F78"),
    "log.sequence_too_long": ("F42",),
    "log.cuda_illegal_memory": ("F05",),
    "loss.nan": DIVERGED,
    "loss.inf": DIVERGED,
    "loss.jump": ("F40", "F61", "F67", "F74", "F77"),
    "grad_norm.*": DIVERGED,
    "estimate.*": MEMORY,
}

TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "runmedic": RUNMEDIC,
    "finetune-doctor": FINETUNE_DOCTOR,
    "soup": SOUP,
    "peft-doctor": PEFT_DOCTOR,
}


def codes_of(peer: str, kind: str) -> tuple[str, ...]:
    """The faults that this kind of warning may mean; none: advice."""
    table = TABLES[peer]
    if kind in table:
        return table[kind]
    fitting = [name for name in table if name.endswith("*") and kind.startswith(name[:-1])]
    check = kind.partition("/")[0]
    return table[max(fitting, key=len)] if fitting else table.get(check, ())
