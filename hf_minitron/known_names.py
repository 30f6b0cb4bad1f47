"""Names that people know from elsewhere, and what they are called here: what an error about an unknown name suggests."""


def _told(table: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return names of elsewhere to ours, of a table of ours to names of elsewhere; the first that is known is meant."""
    found: dict[str, tuple[str, ...]] = {}
    for ours, names in table.items():
        for name in names.split():
            found[name] = (*found.get(name, ()), ours)
    return found


# Axes, by the keys of `config.json` and by what papers call them.
AXES = {
    "layers": "num_hidden_layers num_layers n_layers n_layer num_decoder_layers depth blocks num_blocks",
    "hidden": "hidden_size hidden_dim d_model n_embd n_embed embed_dim embedding_size emb_dim model_dim dim width",
    "ffn": "intermediate_size moe_intermediate_size ffn_hidden_size ffn_dim ffn_size d_ff mlp_dim mlp_hidden_size n_inner mlp "
    "feed_forward dim_feedforward",
    "heads": "num_attention_heads num_heads n_heads n_head attention_heads num_query_heads num_q_heads",
    "kv_heads": "num_key_value_heads num_kv_heads n_kv_heads n_kv_head num_query_groups num_kv_groups multi_query_group_num",
    "head_dim": "head_size kv_channels d_head",
    "experts": "num_experts num_local_experts n_routed_experts n_experts num_moe_experts moe_num_experts",
    "shared_ffn": "shared_expert_intermediate_size",
    "ssm_heads": "mamba_num_heads mamba_n_heads n_mamba_heads",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",
    "vocab": "vocab_size n_vocab padded_vocab_size",
    "dense_ffn": "",
}
CONFIG_NAMES = {name: axis for name, (axis, *_) in _told(AXES).items()}
# Keys, also as `key.key within its table`, by names of before and of TRL, Axolotl, LLaMA-Factory, ModelOpt and Megatron.
RENAMED = _told({
    "sublayers": "halves",
    "learning_rate": "lr max_lr peak_lr",
    "per_device_train_batch_size": "batch_size bs mbs micro_batch_size train_batch_size train_bs per_device_batch_size "
    "per_gpu_train_batch_size micro_batch train_micro_batch_size_per_gpu",
    "batch_size": "per_device_batch_size bs mbs per_device_eval_batch_size",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size per_gpu_eval_batch_size eval_bs",
    "gradient_accumulation_steps": "grad_accum grad_acc gradient_accumulation accumulation_steps grad_accum_steps "
    "grad_acc_steps accum_steps accumulate_grad_batches global_batch_size gbs total_batch_size effective_batch_size",
    "num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps num_steps train_steps total_steps max_train_steps num_train_steps training_steps iters max_iters "
    "train_iters num_iterations tokens num_tokens train_tokens",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_iters",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type lr_decay_style",
    "lr_scheduler_kwargs": "min_lr lr_min eta_min",
    "optim": "optimizer optimiser optimizer_type",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad gradient_clip_val gradient_clipping clip_grad_norm max_norm",
    "adam_beta1": "betas adam_betas",
    "logging_steps": "log_every log_interval log_steps logging_interval log_every_n_steps",
    "eval_steps": "eval_every eval_interval evaluation_steps val_check_interval",
    "eval_strategy": "evaluation_strategy",
    "save_steps": "save_every save_interval save_freq checkpoint_every",
    "save_total_limit": "keep_checkpoints max_checkpoints",
    "early_stopping_patience": "early_stopping patience",
    "ema_decay": "ema use_ema",
    "temperature": "kd_temperature temp tau distill_temperature distillation_temperature softmax_temperature",
    # The weight of one loss beside another's, which ours have each.
    "losses": "loss loss_type loss_fn kd_loss_type criterion divergence alpha alpha_kl alpha_kd alpha_ce kd_alpha kd_ratio "
    "kd_weight",
    "losses.forward_kl": "forward_kl kl kld fkl kl_loss kl_weight kl_coef kd_loss kd_loss_weight logits_loss soft_loss "
    "soft_label_weight",
    "losses.reverse_kl": "reverse_kl rkl",
    "losses.total_variation": "total_variation tvd tv",
    **{f"losses.{name}": name for name in ("jsd", "mse", "cosine")},
    "losses.cross_entropy": "cross_entropy ce ce_loss ce_weight hard_loss hard_label_weight sft_loss lm_loss lm_weight",
    "lmbda": "on_policy on_policy_fraction lambda student_data_fraction",
    "sampling_temperature": "generation_temperature",
    "max_new_tokens": "max_completion_length generate_tokens max_tokens",
    "block_size": "max_length max_seq_length max_seq_len seq_length seq_len seqlen sequence_length sequence_len context_length "
    "context_len ctx_len cutoff_len model_max_length",
    "cross_documents": "packing sample_packing",
    "server": "teacher_model_server base_url",
    "text": "dataset datasets dataset_name dataset_path dataset_id data data_path data_file train_data train_dataset "
    "train_file train_files train_text training_data corpus calib_dataset calib_data calibration_dataset calibration_data",
    "eval_text": "eval_data eval_dataset eval_file val_data val_dataset val_file valid_data validation_data validation_file "
    "test_data test_file",
    "split": "dataset_split train_split",
    "text_column": "text_field dataset_text_field content_column",
    "tokens": "num_samples num_tokens n_samples nsamples calib_size calib_samples calib_tokens num_calib_samples "
    "calibration_samples calibration_tokens num_calibration_samples max_tokens",
    "metric": "importance importance_metric criterion scoring",
    "few_shot": "num_fewshot fewshot n_shot num_shots shots",
    "tasks": "benchmarks benchmark eval_tasks lm_eval lm_eval_tasks",
    "limit": "eval_limit",
    "generate": "prompts",
    "chat_template": "apply_chat_template",
    "attn_implementation": "attn attn_impl flash_attention flash_attn use_flash_attention use_flash_attention_2",
    "bf16": "mixed_precision precision dtype torch_dtype",
    "dtype": "mixed_precision precision torch_dtype",
    "lora": "peft peft_config lora_config use_lora use_peft qlora adapter",
    "lora.r": "lora_r lora_rank",
    "lora.lora_alpha": "lora_alpha",
    "lora.lora_dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules lora_target",
    "base_dtype": "load_in_4bit load_in_8bit quantization quantization_bit bnb_4bit",
    "deepspeed": "ds_config deepspeed_config zero_stage",
    "report_to": "wandb trackio tracker trackers logger log_with use_wandb",
    "teacher": "teacher_model teacher_model_name_or_path teacher_name_or_path",
    "model": "model_name model_name_or_path model_id pretrained_model_name_or_path base_model",
    "repo_id": "hub_model_id hub_repo",
    "export": "formats quantize",
    "gguf_types": "quant_types quants",
    "run": "output_dir out out_dir output output_folder save_dir run_dir",
    "seed": "random_seed",
    "minutes": "time_budget max_time max_minutes hours max_hours time",
    "target": "sizes sparsity target_sparsity ratio keep keep_ratio prune_ratio pruning_ratio compression compression_ratio "
    "share target_params target_size",
    **{f"target.{axis}": f"{axis} {names}" for axis, names in AXES.items()},
})  # fmt: skip
# Fields of peft.LoraConfig, by shorter names.
LORA_FIELDS = {name: ours for name, (ours, *_) in _told({
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets target",
}).items()}  # fmt: skip
# Verbs, and options of those that read no recipe.
VERBS = {name: ours for name, (ours, *_) in _told({
    "init": "new create start draft",
    "plan": "estimate cost",
    "run": "pipeline all launch",
    "score": "calibrate importance",
    "distill": "train finetune fine-tune kd sft distillation",
    "evaluate": "eval benchmark lm-eval",
    "synthesize": "generate",
    "publish": "push upload",
    "export": "convert quantize gguf mlx",
    "report": "show summary status",
}).items()}  # fmt: skip
OPTIONS = {name: ours for name, (ours, *_) in _told({
    "keep": "ratio share size sparsity keep-ratio target params parameters",
    "text": "dataset data dataset-name corpus train-file",
    "gpus": "num-gpus n-gpus gpu devices num-devices nproc-per-node",
    "gpu-memory": "memory vram gpu-mem gpu-ram",
    "gpu-tflops": "tflops flops",
    "output": "out o output-dir output-file out-file path",
    "to": "format formats",
    "types": "quants quant quant-types type",
    "push": "push-to-hub upload",
}).items()}  # fmt: skip
