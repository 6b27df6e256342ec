"""The table of other tools' keys, and of ours in their place; docs/other_tools.md shows it.

Of TRL's DPOConfig, LLaMA-Factory, ms-swift, NeMo-RL, InternVL's scripts and earlier transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TRL, FACTORY, SWIFT, NEMO, INTERNVL = "TRL", "LLaMA-Factory", "ms-swift", "NeMo-RL", "InternVL"
BEFORE = "transformers 4"
ALL_KEYS = "docs/other_tools.md"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One key of other tools.

    Attributes:
        key: its name, with underscores.
        tools: whose it is.
        ours: the dotted recipe key that takes its place; "" if there is none.
        say: what to know besides, or what to do if there is no such key.
        value: our value for theirs; None: the same.
        joint: our value for all settings given together, for keys that share one of ours; it goes before ``value``.
    """

    key: str
    tools: str
    ours: str = ""
    say: str = ""
    value: Callable[[Any], Any] | None = None
    joint: Callable[[Settings], Any] | None = None


# ---- values that are written otherwise here ----


def _items(value: Any) -> list[Any]:
    """Return a list of what is given as a list, or as a text with commas or spaces."""
    if isinstance(value, list | tuple):
        return [item for part in value for item in _items(part)]
    if isinstance(value, str):
        return [item for item in value.replace(",", " ").split() if item]
    return [] if value is None else [value]


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an int may be too large for any float
        return None


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() in ("true", "yes", "1"))


_TERMS = {"sigmoid": "sigmoid", "bco_pair": "bco_pair", "sft": "nll", "nll": "nll"}
_WEIGHT_OF = {  # keys whose value is the weight of a term
    **{"pref_ftx": "nll", "rpo_alpha": "nll", "sft_loss_weight": "nll", "pref_bco_weight": "bco_pair"},
    **{"bco_loss_weight": "bco_pair", "bco_pair_loss_weight": "bco_pair", "quality_loss_weight": "bco_pair"},
    **{"sigmoid_loss_weight": "sigmoid", "preference_loss_weight": "sigmoid"},
}


def _weights(given: Settings) -> dict[str, float] | None:
    """Return ``loss.weights`` of the objective that ``given`` describes; None if it has a term that is not here."""
    names = [str(name) for key in ("loss_type", "pref_loss") for name in _items(given.get(key))]
    if any(name not in _TERMS for name in names):
        return None
    factors = [_number(factor) for factor in _items(given.get("loss_weights"))]
    factors += [1.0] * (len(names) - len(factors))
    weights = {_TERMS[name]: factor for name, factor in zip(names, factors, strict=False) if factor is not None}
    for key, term in _WEIGHT_OF.items():
        factor = _number(given.get(key))
        if factor:
            weights[term] = factor
    if "loss_type" not in given and not {"sigmoid_loss_weight", "preference_loss_weight"} & set(given):
        weights = {"sigmoid": 1.0, **weights}  # LLaMA-Factory and others: DPO, unless told otherwise
    return weights


_FROZEN = {
    **dict.fromkeys(("freeze_vision_tower", "freeze_vit", "freeze_backbone"), "vision_tower"),
    **dict.fromkeys(("freeze_multi_modal_projector", "freeze_aligner", "freeze_mlp"), "multi_modal_projector"),
    **dict.fromkeys(("freeze_language_model", "freeze_llm"), "language_model"),
}


def _frozen(given: Settings) -> list[str]:
    return [part for key, part in _FROZEN.items() if _is_true(given.get(key))]


def _modules(value: Any) -> Any:
    names = _items(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names


def _dtype(value: Any) -> Any:
    return value if value in ("bfloat16", "float32") else None


def _tiles(value: Any) -> int | None:
    pixels = _number(value)
    return None if pixels is None else max(1, round(pixels / 448**2))


def _share(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and 0 <= number < 1 else None


def _bits(value: Any) -> str | None:
    return f"{value}bit" if str(value) in ("4", "8") else None


def _adapter(given: Settings) -> dict[str, Any] | None:
    kinds = (given.get(key) for key in ("finetuning_type", "train_type", "tuner_type", "sft_type", "use_peft"))
    wants_one = any(kind in ("lora", "qlora") or _is_true(kind) for kind in kinds)
    return {"r": given.get("lora_rank") or given.get("lora_r") or 16} if wants_one else None


def _that_adapts(key: str, tools: str) -> Row:
    return Row(key, tools, "model.lora", "for full fine-tuning leave model.lora out", joint=_adapter)


def _of_the_objective(key: str, tools: str) -> Row:
    return Row(key, tools, "loss.weights", "terms: sigmoid, bco_pair and nll (called sft elsewhere)", joint=_weights)


def _that_freezes(key: str, tools: str) -> Row:
    say = "in Qwen-VL the tower is called visual; leave the key out to train all"
    return Row(key, tools, "model.freeze", say, joint=_frozen)


_NO_TEMPLATE = "leave it out: the model's own chat template writes the prompt"
_NO_CACHE = "leave it out: nothing is tokenised ahead of training"
_INITIAL = "the reference is the model before training; another one: MPOTrainer(ref_model=...) in Python"
_NO_PADDING = "leave it out: rows are packed without padding"
_LAUNCHER = "say it to torchrun or accelerate launch: docs/distributed.md"
_TILE = "a tile is 448 x 448 pixels"
_WHOLE_BATCH = "pairs a step are per_device_train_batch_size x gradient_accumulation_steps x processes"

ROWS = (
    # ---- the model ----
    Row("model_name_or_path", f"{TRL}, {FACTORY}, {INTERNVL}", "model.path"),
    Row("model_id_or_path", SWIFT, "model.path"),
    Row("model_name", NEMO, "model.path"),
    Row("pretrained_model_name_or_path", BEFORE, "model.path"),
    Row("adapter_name_or_path", FACTORY, "model.path", "model.path may be the folder of an adapter"),
    Row("adapters", SWIFT, "model.path", "model.path may be the folder of an adapter"),
    Row("model_revision", f"{TRL}, {FACTORY}, {SWIFT}", say="download that revision and name its folder in model.path"),
    Row("model_type", SWIFT, say="leave it out: the checkpoint's config names its family"),
    Row("torch_dtype", f"{TRL}, {SWIFT}", "model.dtype", "float32 or bfloat16", _dtype),
    Row("infer_dtype", FACTORY, "model.dtype", "float32 or bfloat16", _dtype),
    Row("pure_bf16", FACTORY, "model.dtype", value=lambda value: "bfloat16" if _is_true(value) else "float32"),
    Row("attn_implementation", TRL, say="leave it out: vlmpo brings the attention that shares prompts"),
    Row("attn_impl", SWIFT, say="leave it out: vlmpo brings the attention that shares prompts"),
    Row("flash_attn", FACTORY, say="leave it out: vlmpo brings the attention that shares prompts"),
    Row("use_custom_flash_attn", INTERNVL, say="leave it out: vlmpo brings the attention that shares prompts"),
    Row("enable_liger_kernel", FACTORY, "training.use_liger_kernel", "on CUDA it is the default (model.kernels)"),
    Row("use_liger", f"{SWIFT}, {INTERNVL}", "training.use_liger_kernel", "on CUDA it is the default (model.kernels)"),
    Row("device_map", SWIFT, say=f"leave it out; several GPUs: {_LAUNCHER}"),
    Row("drop_path_rate", INTERNVL, say="leave it out: noise in the policy alone would move the first rewards"),
    Row("disable_dropout", TRL, say="leave it out: dropout is always off"),
    Row("grad_checkpoint", INTERNVL, "training.activation_checkpointing", value=_is_true),
    Row(
        *("disable_gradient_checkpointing", FACTORY, "training.activation_checkpointing"),
        value=lambda value: not _is_true(value),
    ),
    *(
        _that_freezes(key, tools)
        for key, tools in (
            *(
                (key, FACTORY)
                for key in ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")
            ),
            *((key, SWIFT) for key in ("freeze_vit", "freeze_aligner")),
            *((key, INTERNVL) for key in ("freeze_backbone", "freeze_mlp")),
            ("freeze_llm", f"{SWIFT}, {INTERNVL}"),
        )
    ),
    Row("freeze_parameters", SWIFT, "model.freeze", "names of submodules", _items),
    # ---- adapters ----
    _that_adapts("finetuning_type", FACTORY),
    _that_adapts("train_type", SWIFT),
    _that_adapts("tuner_type", SWIFT),
    _that_adapts("sft_type", SWIFT),
    _that_adapts("use_peft", TRL),
    Row("peft_config", TRL, "model.lora", "fields of peft.LoraConfig"),
    Row("lora_rank", f"{FACTORY}, {SWIFT}", "model.lora.r"),
    Row("lora_r", TRL, "model.lora.r"),
    Row("use_llm_lora", INTERNVL, "model.lora.r"),
    Row("lora_alpha", f"{TRL}, {FACTORY}, {SWIFT}", "model.lora.lora_alpha"),
    Row("lora_dropout", f"{TRL}, {FACTORY}, {SWIFT}", "model.lora.lora_dropout", "dropout is switched off in training"),
    Row("lora_target", FACTORY, "model.lora.target_modules", value=_modules),
    Row("lora_target_modules", TRL, "model.lora.target_modules", value=_modules),
    Row("target_modules", f"PEFT, {SWIFT}", "model.lora.target_modules", value=_modules),
    Row("lora_modules_to_save", TRL, "model.lora.modules_to_save", value=_items),
    Row("additional_target", FACTORY, "model.lora.modules_to_save", value=_items),
    Row("modules_to_save", f"PEFT, {SWIFT}", "model.lora.modules_to_save", value=_items),
    Row("use_dora", f"{TRL}, {FACTORY}, {SWIFT}", "model.lora.use_dora"),
    Row("use_rslora", f"{TRL}, {FACTORY}, {SWIFT}", "model.lora.use_rslora"),
    Row("quantization_bit", FACTORY, "model.quantize", value=_bits),
    Row("quant_bits", SWIFT, "model.quantize", value=_bits),
    Row("load_in_4bit", TRL, "model.quantize", value=lambda value: "4bit" if _is_true(value) else None),
    Row("load_in_8bit", TRL, "model.quantize", value=lambda value: "8bit" if _is_true(value) else None),
    Row("lora_target_parameters", TRL, "model.lora.target_parameters", value=_items),
    Row("lora_task_type", TRL, say="leave it out"),
    Row("bnb_4bit_quant_type", TRL, say="leave it out: 4bit is nf4 with double quantization"),
    Row("bnb_4bit_quant_storage", TRL, say="leave it out: 4bit is nf4 with double quantization"),
    Row("use_bnb_nested_quant", TRL, say="leave it out: 4bit is nf4 with double quantization"),
    Row(
        "model_init_kwargs", TRL, say="model.dtype, model.quantize and model.trust_remote_code are what there is of it"
    ),
    Row("activation_offloading", TRL, say="not available: training.activation_checkpointing holds fewer activations"),
    Row("ignore_bias_buffers", TRL, say="leave it out"),
    # ---- the objective ----
    *(
        _of_the_objective(key, tools)
        for key, tools in (
            ("loss_type", f"{TRL}, {SWIFT}, {INTERNVL}"),
            ("loss_weights", f"{TRL}, {SWIFT}"),
            ("rpo_alpha", f"{TRL}, {SWIFT}, {INTERNVL}"),
            *((key, FACTORY) for key in ("pref_loss", "pref_ftx", "pref_bco_weight")),
            *((key, INTERNVL) for key in ("sigmoid_loss_weight", "bco_pair_loss_weight")),
            *((key, NEMO) for key in ("preference_loss_weight", "sft_loss_weight", "bco_loss_weight")),
        )
    ),
    Row("pref_beta", FACTORY, "loss.beta"),
    Row("reference_policy_kl_penalty", NEMO, "loss.beta"),
    Row("dpo_label_smoothing", FACTORY, "loss.label_smoothing"),
    Row("label_smoothing_factor", "transformers", "loss.label_smoothing"),
    Row("preference_loss", NEMO, say="leave it out: loss.weights names the terms"),
    Row("reward_shift_momentum", NEMO, say="loss.reward_shift is previous, running or none: docs/objective.md"),
    Row("sft_average_log_probs", NEMO, say="the nll term is a mean over each response (loss.nll_reduction: sequence)"),
    Row("preference_average_log_probs", NEMO, say="log-probs are summed over a response, as in the paper"),
    Row("rlhf_type", SWIFT, say="leave it out: loss.weights is the objective ({sigmoid: 1} is DPO, the default MPO)"),
    Row("stage", FACTORY, say="leave it out: loss.weights is the objective ({sigmoid: 1} is DPO, {nll: 1} is SFT)"),
    Row("reference_free", f"{TRL}, {INTERNVL}", say="not available: rewards are relative to the reference"),
    Row("simpo_gamma", f"{FACTORY}, {SWIFT}", say="not available: SimPO is none of the terms"),
    Row("cpo_alpha", SWIFT, say="not available: CPO is none of the terms"),
    Row("f_divergence_type", TRL, say="not available: the rewards are those of the reverse KL"),
    Row("f_alpha_divergence_coef", TRL, say="not available: the rewards are those of the reverse KL"),
    Row("ld_alpha", f"{TRL}, {FACTORY}, {SWIFT}", say="not available"),
    Row("use_weighting", TRL, say="not available"),
    Row("discopop_tau", TRL, say="not available"),
    Row("router_aux_loss_coef", TRL, say="it is the model's own: its config's output_router_logits switches it on"),
    Row("moe_aux_loss_coef", FACTORY, say="it is the model's own: its config's output_router_logits switches it on"),
    # ---- the reference ----
    Row(
        *("precompute_ref_log_probs", TRL, "reference.kind"),
        value=lambda value: "cache" if _is_true(value) else "auto",
    ),
    Row("precompute_ref_batch_size", TRL, "training.per_device_eval_batch_size"),
    Row("ref_model", f"{FACTORY}, {SWIFT}", say=_INITIAL),
    Row("ref_model_name_or_path", TRL, say=_INITIAL),
    Row("ref_model_adapters", FACTORY, say=_INITIAL),
    *(
        Row(key, TRL, say="not available: the reference stays what it was at the start")
        for key in ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    ),
    # ---- data ----
    Row("dataset", f"{FACTORY}, {SWIFT}", "data.train", "files, meta.json of MMPR, folders or Hub names", _items),
    Row("dataset_name", TRL, "data.train", "files, meta.json of MMPR, folders or Hub names", _items),
    Row("datasets", TRL, "data.train", "each a path, or {path: ..., image_root: ...}"),
    Row("train_dataset", TRL, "data.train", "files, meta.json of MMPR, folders or Hub names", _items),
    Row("meta_path", INTERNVL, "data.train", value=_items),
    Row("data_path", f"{NEMO}, {INTERNVL}", "data.train", value=_items),
    Row("eval_dataset", f"{TRL}, {FACTORY}", "data.eval", value=_items),
    Row("val_dataset", SWIFT, "data.eval", value=_items),
    Row("dataset_dir", FACTORY, say="write the folder into the path of each item of data.train"),
    Row("media_dir", FACTORY, say="write it as image_root of each item of data.train"),
    Row("image_folder", BEFORE, say="write it as image_root of each item of data.train"),
    Row("dataset_config", TRL, say="write it as subset of the item of data.train"),
    Row("dataset_train_split", TRL, say="write it as split of the item of data.train"),
    Row("dataset_test_split", TRL, say="write the item with its split into data.eval"),
    Row("val_size", FACTORY, "data.hold_out", "a share of the pairs, split by image", _share),
    Row("split_dataset_ratio", SWIFT, "data.hold_out", "a share of the pairs, split by image", _share),
    Row("split_validation_size", NEMO, "data.hold_out", "a share of the pairs, split by image", _share),
    Row("cutoff_len", FACTORY, "data.max_length", "longer pairs are dropped and counted; images are never cut"),
    Row("max_seq_length", INTERNVL, "data.max_length", "longer pairs are dropped and counted; images are never cut"),
    Row("max_total_sequence_length", NEMO, "data.max_length", "longer pairs are dropped and counted"),
    Row("max_prompt_length", TRL, "data.max_length", "prompt and longer response together; prompts are never cut"),
    Row("max_completion_length", TRL, "data.max_length", "prompt and longer response together"),
    Row("truncation_mode", TRL, "data.over_long", "drop or cut", lambda _: "cut"),
    Row(
        *("truncation_strategy", SWIFT, "data.over_long", "drop or cut"),
        value=lambda value: "drop" if value == "delete" else "cut",
    ),
    Row("max_pixels", f"{SWIFT}, Qwen-VL", "data.max_tiles", _TILE, _tiles),
    Row("image_max_pixels", FACTORY, "data.max_tiles", _TILE, _tiles),
    Row("max_dynamic_patch", INTERNVL, "data.max_tiles"),
    Row("max_num_tiles", NEMO, "data.max_tiles"),
    Row("max_num_frame", INTERNVL, "data.video_frames"),
    Row("video_maxlen", FACTORY, "data.video_frames"),
    Row("max_samples", FACTORY, say="write repeat, a share of the pairs, into the item of data.train"),
    Row("strict", SWIFT, "data.on_bad_record", value=lambda value: "fail" if _is_true(value) else "skip"),
    *(
        Row(key, FACTORY, say=_NO_CACHE)
        for key in (*("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size", "tokenized_path"),)
    ),
    Row("dataset_num_proc", f"{TRL}, {SWIFT}", say=_NO_CACHE),
    Row("load_from_cache_file", SWIFT, say=_NO_CACHE),
    Row("template", f"{FACTORY}, {SWIFT}", say=_NO_TEMPLATE),
    Row("conv_style", INTERNVL, say=_NO_TEMPLATE),
    Row("chat_template_path", TRL, say=_NO_TEMPLATE),
    Row("system", SWIFT, say="write a system message into the prompts"),
    Row("streaming", f"{FACTORY}, {SWIFT}", say="not available: order and counts need a length"),
    Row("dataset_streaming", TRL, say="not available: order and counts need a length"),
    Row("data_collator", TRL, say="leave it out: vlmpo lays out rows itself"),
    *(
        Row(key, tools, say=_NO_PADDING)
        for key, tools in (
            *(("padding_free", f"{TRL}, {SWIFT}"), ("packing", f"{FACTORY}, {SWIFT}"), ("neat_packing", FACTORY)),
            *(("pad_to_multiple_of", TRL), ("padding_value", TRL), ("pad_token", TRL), ("pad2square", INTERNVL)),
        )
    ),
    *(
        Row(key, INTERNVL, say="leave it out: the model's own processor cuts images into tiles")
        for key in (
            *("force_image_size", "down_sample_ratio", "dynamic_image_size", "use_thumbnail", "ps_version"),
            *("vision_select_layer", "use_fast_tokenizer", "min_dynamic_patch"),
        )
    ),
    Row("use_data_resampling", INTERNVL, say="leave it out: repeat_time of meta.json, or repeat of the item, decides"),
    # ---- training ----
    Row("warmup_ratio", BEFORE, "training.warmup_steps", "below 1 it is a share of all steps"),
    Row("evaluation_strategy", BEFORE, "training.eval_strategy"),
    Row("per_gpu_train_batch_size", BEFORE, "training.per_device_train_batch_size"),
    Row("per_gpu_eval_batch_size", BEFORE, "training.per_device_eval_batch_size"),
    Row("no_cuda", BEFORE, "training.use_cpu", value=_is_true),
    Row("group_by_length", BEFORE, say="leave it out: rows are packed and ranks balanced by length"),
    Row("logging_dir", BEFORE, say="leave it out: metrics.jsonl and the report are in training.output_dir"),
    Row("overwrite_output_dir", BEFORE, say="name another training.output_dir, or training.resume_from_checkpoint"),
    Row("save_safetensors", BEFORE, say="leave it out: weights are always written as safetensors"),
    Row("use_fast_image_processor", BEFORE, say="leave it out"),
    Row("plot_loss", FACTORY, say="leave it out: report.html is written at the end"),
    Row("ignore_pad_token_for_loss", FACTORY, say=_NO_PADDING),
    Row("lr", NEMO, "training.learning_rate"),
    Row("max_num_steps", NEMO, "training.max_steps"),
    Row("max_num_epochs", NEMO, "training.num_train_epochs"),
    Row("train_micro_batch_size", NEMO, "training.per_device_train_batch_size", _WHOLE_BATCH),
    Row("train_global_batch_size", NEMO, "training.gradient_accumulation_steps", _WHOLE_BATCH, lambda _: None),
    Row("global_batch_size", BEFORE, "training.gradient_accumulation_steps", _WHOLE_BATCH, lambda _: None),
    Row("val_period", NEMO, "training.eval_steps"),
    Row("save_period", NEMO, "training.save_steps"),
    Row("checkpoint_dir", NEMO, "training.output_dir"),
    Row("keep_top_k", NEMO, "training.save_total_limit"),
    Row("metric_name", NEMO, "training.metric_for_best_model", "e.g. eval_rewards/accuracies", lambda _: None),
    Row("create_checkpoint_symlink", SWIFT, say="leave it out"),
    Row("add_version", SWIFT, say="leave it out: the run is in training.output_dir itself"),
    Row("vit_lr", SWIFT, "training.learning_rates.vision"),
    Row("aligner_lr", SWIFT, "training.learning_rates.projector"),
    Row("vit_gradient_checkpointing", SWIFT, say="model.vision_memory: recompute does this for the vision tower"),
    Row("sequence_parallel_size", SWIFT, say="not available: training.max_tokens_per_row bounds a row's memory"),
    Row("use_unsloth", FACTORY, say="not available"),
    Row("use_swanlab", FACTORY, "training.report_to", value=lambda value: "swanlab" if _is_true(value) else "none"),
    Row("hub_token", "transformers", say="log in with `hf auth login`, or set HF_TOKEN: a recipe is kept with the run"),
    Row("hf_hub_token", FACTORY, say="log in with `hf auth login`, or set HF_TOKEN: a recipe is kept with the run"),
    *(
        Row(key, tools, say=_LAUNCHER)
        for key, tools in (
            *(("num_processes", "accelerate"), ("nproc_per_node", "torchrun"), ("nnodes", "torchrun")),
            *(("gpus_per_node", NEMO), ("num_nodes", NEMO), ("cluster", NEMO), ("num_gpus", BEFORE)),
        )
    ),
    *(
        Row(key, NEMO, say=f"its keys have other places here: {ALL_KEYS}")
        for key in (*("mpo", "dpo", "policy", "checkpointing", "logger"),)
    ),
    Row("tokenizer", "TRL before 0.12", say="leave it out: the processor beside the model is read"),
    Row("processing_class", TRL, say="leave it out: the processor beside the model is read"),
)
TABLE: Mapping[str, Row] = {row.key: row for row in ROWS}
