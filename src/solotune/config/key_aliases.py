"""Keys of other tools: with solotune's names for them, without a counterpart, and refused on purpose.

`foreign_keys.answer` makes the message; there are also the keys whose value means something else here.
"""

# Axolotl, LLaMA-Factory, ms-swift, Unsloth, Soup, TRL -> solotune: refused with the right name. A name stands here only
# if it is the same setting, since users rename the key and keep the value (or `foreign_keys.CONVERTED` converts it).
FOREIGN_KEYS = {
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "base": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_name": "model_name_or_path",
    "revision": "model_revision",
    "datasets": "dataset",
    "dataset_name": "dataset",
    "train_file": "dataset",
    "local_dataset": "dataset",
    "dataset_train_split": "dataset_split",
    "split": "dataset_split",
    "validation_file": "eval_dataset",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "gradient_clipping": "max_grad_norm",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "lora_target_linear": "lora_target_modules",
    "val_set_size": "validation_size",
    "val_size": "validation_size",
    "val_split": "validation_size",
    "test_size": "validation_size",
    "split_dataset_ratio": "validation_size",
    "train_on_inputs": "assistant_only_loss",
    "train_on_prompt": "assistant_only_loss",
    "train_on_responses_only": "assistant_only_loss",
    "completion_only_loss": "assistant_only_loss",
    "columns": "column_mapping",
    "field_mapping": "column_mapping",
    "exact_deduplication": "dataset_exact_deduplication",
    "deduplicate": "dataset_exact_deduplication",
    "dedup": "dataset_exact_deduplication",
    "remove_duplicates": "dataset_exact_deduplication",
    "excess_length_strategy": "overflow",
    "truncation_strategy": "overflow",
    "mask_history": "train_on_last_turn",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "chat_template": "chat_template_path",
    "chat_template_jinja": "chat_template_path",
    "quantization": "base_precision",
    "quantization_bit": "base_precision",
    "quant_bits": "base_precision",
    "load_in_8bit": "base_precision",
    "double_quantization": "bnb_4bit_use_double_quant",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "evaluation_strategy": "eval_strategy",
    "output": "output_dir",
    "activation_checkpointing": "gradient_checkpointing",
    "torch_dtype": "bf16",
    "dtype": "bf16",
    "no_cuda": "use_cpu",
    "model_max_length": "max_length",
    "sequence_length": "max_length",
    "eval_batch_size": "per_device_eval_batch_size",
    "dataset_config_name": "dataset_config",
    "subset": "dataset_config",
    "dataset_test_split": "eval_dataset_split",
    "revision_of_model": "model_revision",
    "weight_decay_rate": "weight_decay",
    "quantization_type": "bnb_4bit_quant_type",
    "gpu_memory_limit": "memory_budget",
    "eval_max_new_tokens": "max_new_tokens",
    "test_split_size": "validation_size",
    "early_stopping_steps": "early_stopping_patience",
    "eval_metrics": "metrics",
    "compute_metrics": "metrics",
    "metric_list": "metrics",
    "scorer": "metrics",
}

_TRACKERS = (
    "report_to is the setting (tensorboard, wandb, mlflow, trackio); project and server come from the tracker's own "
    "variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_PROJECT)"
)
_LOGGING = "metrics.jsonl in the run directory has every step; logging_steps is the setting for what is printed"
_ONE_DEVICE = "solotune trains on one device, in one process"
_READING = "rows are read one at a time and cached by their content"
_TOKENS = "the tokenizer's own tokens are used; they are set in the model folder (tokenizer_config.json)"
_PLAIN_LORA = "solotune trains plain LoRA or rsLoRA (use_rslora)"
_KERNELS = "solotune compiles the layers (torch_compile) and has its own loss in chunks"
_ANSWERS = "samples and chat are greedy; num_samples and max_new_tokens are the settings"
_LAST_STEP = "the adapter of the last step is kept, or the best (load_best_model_at_end); others are in checkpoints/"
_BEST = "load_best_model_at_end and early_stopping_patience take a held-out loss that is lower by more than its noise"
_PADDING = "packing: true puts several rows in one sequence, without padding between them"
_MODEL = "tokenizer, config and architecture come from model_name_or_path"
_SFT = "solotune only does supervised fine-tuning (SFT)"
_SYSTEM = "system prompts come from the rows: a message with role system, or a column named system"
_LOADING = "solotune loads the weights in its own way, and needs no such setting"
_SCHEDULE = "the schedule has only lr_scheduler_type, warmup_steps and warmup_ratio"

# keys without a counterpart, and what is done instead
NOT_HERE = {
    "overwrite_cache tokenized_path dataset_prepared_path preprocessing_num_workers preprocessing_batch_size "
    "dataset_num_proc dataset_processes num_workers streaming dataset_streaming buffer_size mix_strategy "
    "interleave_probs data_shared_file_system dataset_keep_in_memory shuffle_merged_datasets "
    "shuffle_before_merging_datasets download_mode dataset_kwargs skip_prepare_dataset": _READING,
    "dataset_dir data_dir media_dir": "dataset names the files themselves: dataset: [data/a.jsonl, data/b.jsonl]",
    "overwrite_output_dir": "a folder that contains a run is never overwritten; use another output_dir, or --resume",
    "run_name project logging_dir use_wandb use_mlflow use_swanlab use_tensorboard use_comet use_trackio": _TRACKERS,
    "plot_loss logging_strategy logging_first_step logging_nan_inf_filter include_num_input_tokens_seen "
    "include_tokens_per_second log_level log_level_replica disable_tqdm": _LOGGING,
    "deepspeed fsdp fsdp_config local_rank world_size accelerator_config device ddp parallelism_config "
    "tensor_parallel_size context_parallel_size sequence_parallel ray_num_workers use_ray use_orig_params "
    "max_memory": _ONE_DEVICE,
    "eos_token pad_token bos_token unk_token sep_token cls_token mask_token special_tokens tokens add_tokens "
    "add_special_tokens additional_special_tokens eot_tokens new_special_tokens_config init_special_tokens "
    "resize_vocab split_special_tokens skip_special_tokens added_tokens_overrides fix_untrained_tokens train_on_eos "
    "train_on_eot": _TOKENS,
    "trainable_token_indices modules_to_save lora_modules_to_save additional_target layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern exclude_modules target_parameters lora_target_parameters lora_fan_in_fan_out "
    "fan_in_fan_out loftq_config lora_model_dir adapter_name_or_path create_new_adapter relora lora_on_cpu "
    "merge_lora use_galore use_apollo use_badam use_adam_mini use_muon use_llama_pro embedding_lr embedding_lr_scale "
    "inference_mode layer_replication ensure_weight_tying module_dropout": _PLAIN_LORA,
    "use_liger_kernel enable_liger_kernel liger_kernel_config use_unsloth use_unsloth_gc use_kernels shift_attn "
    "s2_attention torch_compile_backend torch_compile_mode torch_compile_options chunked_cross_entropy tf32 "
    "tiled_mlp flex_attention sage_attention fp8 gradient_checkpointing_kwargs activation_checkpointing_kwargs "
    "use_reentrant_gc upcast_layernorm upcast_lmhead_output full_determinism use_cache auto_find_batch_size "
    "torch_empty_cache_steps gc_steps gc_collect_steps": _KERNELS,
    "do_predict predict_with_generate infer_backend infer_dtype temperature top_k top_p num_beams do_sample "
    "repetition_penalty length_penalty eval_num_beams": _ANSWERS,
    "greater_is_better early_stopping_threshold": _BEST,
    "save_only_model save_first_step restore_callback_states_from_checkpoint ignore_data_skip": _LAST_STEP,
    "group_by_length train_sampling_strategy length_column_name packing_strategy padding_free pad_to_multiple_of "
    "pad_to_sequence_len eval_packing eval_sample_packing max_packed_sequence_len truncation_mode disable_shuffling "
    "block_diag_attn": _PADDING,
    "tokenizer_name tokenizer_config tokenizer_type tokenizer_use_fast use_fast_tokenizer base_model_config model_type "
    "type_of_model processor_type cls_model_config rope_scaling is_llama_derived_model model_init_kwargs config_name "
    "cache_dir": _MODEL,
    "low_cpu_mem_usage quantization_method quantization_device_map bnb_4bit_quant_storage offload_folder "
    "llm_int8_threshold quant_method bnb_config_kwargs use_kv_cache": _LOADING,
    "rl rl_beta ref_model reward_model loss_type": _SFT,
    "default_system default_system_message system_prompt": _SYSTEM,
    "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio optim_args optim_target_modules lr_groups "
    "lr_quadratic_warmup adam_beta3 adam_epsilon2": _SCHEDULE,
    "data_seed": "seed is for everything: adapter, row order, dropout and split",
    "ddp_timeout dataloader_num_workers": _ONE_DEVICE,
    "auto_resume_from_checkpoints": "solotune train CONFIG --resume continues the newest run of the config",
    "do_eval eval_delay eval_on_start eval_accumulation_steps bf16_full_eval fp16_full_eval prediction_loss_only "
    "compute_accuracy eval_on_each_dataset batch_eval_metrics": "validation_size, eval_dataset and eval_strategy say "
    "what is evaluated, and when",
    "neat_packing_strategy remove_unused_columns label_names average_tokens_across_devices": _READING,
    "token hf_token hub_token hf_hub_token use_auth_token hf_use_auth_token ms_hub_token om_hub_token "
    "push_to_hub_token": "the hub's token is the variable HF_TOKEN, or that of `hf auth login`",
    "save_dir export_dir": "the adapter is saved in the run directory (output_dir)",
}

# the same for whole families of keys
PATTERNS = {
    r"(wandb|swanlab|comet|mlflow|hf_mlflow|trackio|otel|profiler|use_otel)_\w+": _TRACKERS,
    r"(push_to_hub|hub|push_dataset_to_hub)(_\w+)?": "solotune uploads nothing; `hf upload` does",
    r"(ddp|fsdp|dp|megatron|ray|dataloader|accelerator|hyper_parallel|nccl)_\w+|\w+_parallel_size": _ONE_DEVICE,
    r"(galore|apollo|badam|loraplus|relora|lisa|pissa|oft|dion|qgalore|freeze|loftq|peft|lora)_\w+": _PLAIN_LORA,
    r"use_\w*lora|\w+lora_config": _PLAIN_LORA,
    r"(dpo|kto|ppo|orpo|simpo|grpo|cpo|rpo|pref|ref_model|reward_model|reward|vllm|sglang)_\w+": _SFT,
    r"(flash_attn|flex_attn|kt|unsloth|cut_cross_entropy|liger)_\w+": _KERNELS,
    r"(image|video|audio)_\w+": "solotune trains on text",
    r"(field|message_field)_\w+": "column_mapping renames columns: {question: prompt, answer: completion}",
    r"(export)_\w+": "the adapter is saved as safetensors in the run directory",
    r"\w+_token|\w+_tokens": _TOKENS,
}

REFUSED_KEYS = {
    "trust_remote_code": "solotune never runs code that comes with a model or a dataset; remove the line",
    "device_map": "solotune trains on one device (a CUDA GPU if there is one, or use_cpu: true); remove the line",
    "fp16": "solotune trains in bfloat16 or float32; remove the line and use bf16: true or bf16: false",
}
