"""Every private name of another library that vlmpo uses, each with its reason.

Private names may change in any release, so no other module may use one, and ``tests/test_compat.py`` holds each to the
form it has in the tested versions: transformers 5.23, accelerate 1.15, torch 2.11. A new version that changes one
fails there, in one place.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

# ---- transformers: models, configs and processors ----


def name_or_path(config: Any) -> str | None:
    """Return the name or folder that a model's config was loaded from, or None if the model was built in memory."""
    return getattr(config, "_name_or_path", None) or None


def is_image_text_config(config: Any) -> bool:
    """Return whether ``AutoModelForImageTextToText`` has a class for ``config``; there is no public way to look it up.

    transformers maps config classes to model classes in ``_model_mapping`` (a ``_LazyAutoMapping``).
    """
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


def attention_implementation(config: Any) -> str:
    """Return the name of the attention that models of ``config`` use; there is only a setter that is public.

    ``PreTrainedModel.set_attn_implementation`` sets it (``_attn_implementation``).
    """
    return str(config._attn_implementation)


def layers_to_wrap(model: Any) -> set[str]:
    """Return the class names of the layers that must stay whole when a model is sharded (``_no_split_modules``)."""
    return set(getattr(model, "_no_split_modules", None) or ())


def has_transformers_adapter(model: Any) -> bool:
    """Return whether transformers itself, not PEFT, loaded an adapter into the model (``_hf_peft_config_loaded``)."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def router_class(module: Any) -> type | None:
    """Return the class of the routers whose logits transformers records for ``module``; None if it records none.

    ``_can_record_outputs`` maps names of outputs to recorders; the routers of every family are found by it.
    """
    recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
    return None if recorder is None else recorder.target_class


def image_token_counter(processor: Any) -> Callable[..., Any] | None:
    """Return the processor's function from image sizes to numbers of tokens, or None if it has none.

    ``_get_num_multimodal_tokens(image_sizes=[[height, width], ...], **settings)`` counts without reading an image.
    """
    count: Callable[..., Any] | None = getattr(processor, "_get_num_multimodal_tokens", None)
    return count


def settings_merger(processor: Any) -> Callable[..., Any] | None:
    """Return the function that merges and checks a processor's settings at each call, or None (``_merge_kwargs``)."""
    merge: Callable[..., Any] | None = getattr(processor, "_merge_kwargs", None)
    return merge


def replace_settings_merger(processor: Any, merge: Callable[..., Any]) -> None:
    """Make this one processor merge its settings by ``merge`` (``_merge_kwargs``)."""
    processor._merge_kwargs = merge


def rotation_of(kind: type) -> Callable[..., Any]:
    """Return the function by which an attention class rotates queries and keys (``apply_rotary_pos_emb``).

    It is a global of the class's module, so it cannot be replaced for one model alone; :func:`rotating_by` can.
    """
    rotate: Callable[..., Any] = _forward_of(kind).__globals__["apply_rotary_pos_emb"]
    return rotate


def rotating_by(kind: type, rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an attention class with ``rotate`` in the place of :func:`rotation_of`.

    The class and its module stay as they are: the function's code is read with globals of its own. They have no name:
    by it torch.compile would look up the module's rotation for its guards.
    """
    forward = _forward_of(kind)
    scope = {**forward.__globals__, "apply_rotary_pos_emb": rotate}
    del scope["__name__"]
    made = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _forward_of(kind: Any) -> Any:
    """Return the forward of a class, under any decorator; raise AttributeError if it rotates by no such global."""
    forward = inspect.unwrap(kind.forward)
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        raise AttributeError(f"{kind.__name__}.forward calls no apply_rotary_pos_emb")
    return forward


# ---- transformers: Trainer and TrainingArguments ----

# Methods of transformers.Trainer that MPOTrainer overrides, with their parameters in transformers 5.23.
TRAINER_OVERRIDES = {
    "_determine_best_metric": "(self, metrics, trial)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_learning_rate": "(self)",
    "_get_output_dir": "(self, trial)",
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_prepare_inputs": "(self, inputs)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
    "_save_checkpoint": "(self, model, trial)",
    "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    "create_accelerator_and_postprocess": "(self)",
    "create_model_card": (
        "(self, language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, "
        "dataset_tags=None, dataset=None, dataset_args=None)"
    ),
    "create_optimizer": "(self, model=None)",
    "evaluate": "(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')",
    "floating_point_ops": "(self, inputs)",
    "get_batch_samples": "(self, epoch_iterator, num_batches, device)",
    "get_eval_dataloader": "(self, eval_dataset=None)",
    "get_train_dataloader": "(self)",
    "init_hf_repo": "(self, token=None, private=None)",
    "log": "(self, logs, start_time=None)",
    "push_to_hub": (
        "(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, **kwargs)"
    ),
    "save_model": "(self, output_dir=None, _internal_call=False)",
    "set_initial_training_values": "(self, args, dataloader)",
    "train": "(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)",
    "training_step": "(self, model, inputs, num_items_in_batch=None)",
}


def loss_sums(trainer: Any) -> dict[str, float]:
    """Return what ``trainer`` has added up of the training loss in this session, on this rank.

    ``total`` is the sum over optimizer steps up to the last log (``_total_loss_scalar``), ``since_log`` the sum since
    then (``_tr_loss``), ``logged`` the step of that log (``_globalstep_last_logged``).
    """
    return {
        "total": float(trainer._total_loss_scalar),
        "since_log": float(trainer._tr_loss),
        "logged": int(trainer._globalstep_last_logged),
    }


def restore_loss_sums(trainer: Any, total: float, since_log: float, logged: float) -> None:
    """Set what :func:`loss_sums` returns; once training has begun, which sets all to 0."""
    trainer._total_loss_scalar = total
    trainer._tr_loss.fill_(since_log)
    trainer._globalstep_last_logged = int(logged)


def batch_size_per_device(trainer: Any) -> int:
    """Return the batch size in use, which ``auto_find_batch_size`` may have lowered (``_train_batch_size``)."""
    return int(trainer._train_batch_size)


def use_one_gpu(args: Any) -> None:
    """Keep Trainer from using all GPUs of one process by DataParallel; ``n_gpu`` has no setter (``_n_gpu``)."""
    args._n_gpu = 1


def fields_given_as_json() -> list[str]:
    """Return the fields of TrainingArguments that may be given as JSON text (``_VALID_DICT_FIELDS``).

    A subclass names its own such fields by setting the same attribute.
    """
    from transformers import TrainingArguments

    return list(TrainingArguments._VALID_DICT_FIELDS)


# ---- accelerate ----


def set_gradient_sync(accelerator: Any, due: bool) -> None:
    """Set whether gradients are due in the next backward pass (``GradientState._set_sync_gradients``).

    accelerate itself sets it once a micro-batch; vlmpo has several backward passes in one.
    """
    accelerator.gradient_state._set_sync_gradients(due)


def forget_model(accelerator: Any, model: Any) -> None:
    """Remove a model that only answers from accelerate's list of models (``Accelerator._models``).

    accelerate would keep it in memory for good, and write it with every saved state.
    """
    accelerator._models[:] = [other for other in accelerator._models if other is not model]


def is_prepared(model: Any) -> bool:
    """Return whether accelerate has prepared ``model`` for training (``_is_accelerate_prepared``)."""
    return bool(getattr(model, "_is_accelerate_prepared", False))


def undo_preparation(model: Any) -> None:
    """Make accelerate prepare a model again that another trainer had it prepare, perhaps under another autocast.

    It would leave a model alone that has its mark (``_is_accelerate_prepared``); under autocast it replaced the model's
    forward and kept it (``_original_forward``).
    """
    vars(model).pop("_is_accelerate_prepared", None)
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        model.forward = forward


# ---- torch ----


def set_last_rates(scheduler: Any, rates: list[float]) -> None:
    """Set the rates that a torch scheduler reports as its last ones (``_last_lr``), by group."""
    scheduler._last_lr = rates


def is_dropout(module: Any) -> bool:
    """Return whether ``module`` is a dropout layer of any dimension, with a rate ``p`` (``_DropoutNd``)."""
    from torch.nn.modules.dropout import _DropoutNd

    return isinstance(module, _DropoutNd)


@contextmanager
def watching_operations(see: Callable[[list[Any], list[Any]], None]) -> Iterator[None]:
    """Call ``see`` with the tensors that each operation in the body was given, and with those that it returned.

    Operations of a backward pass on a CPU are seen too. There is no public way (``TorchDispatchMode``,
    ``torch.utils._python_dispatch``).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            see(tensors_in((args, kwargs)), tensors_in(out))
            return out

    with Watch():
        yield


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Let operations in the body mix tensors on the meta device with real ones; they return tensors without values.

    A model on the meta device can then ask real inputs for their values, e.g. an image's size. Whole numbers stay real
    if they are moved to the meta device (``TorchDispatchMode``).
    """
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
            elif func is torch.ops.aten._to_copy.default and str((kwargs or {}).get("device")) == "meta":
                kwargs = kwargs if args[0].is_floating_point() else {**kwargs, "device": torch.device("cpu")}
            return func(*args, **(kwargs or {}))

    with Shapes():
        yield


def tensors_in(nested: Any) -> list[Any]:
    """Return the tensors in nested lists, tuples, dicts and outputs of models (``torch.utils._pytree``)."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def is_batch_norm(module: Any) -> bool:
    """Return whether ``module`` is a batch norm of any dimension (``_BatchNorm``)."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


def checkpoint_by(layer: Any, around: Callable[..., Any]) -> None:
    """Have a layer that is computed again do so by ``around(checkpoint, ...)``, given what did it before.

    transformers' layers keep the function in ``_gradient_checkpointing_func``.
    """
    layer._gradient_checkpointing_func = partial(around, layer._gradient_checkpointing_func)


def parameter_places(model: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Return where the modules of ``model`` keep their parameters: the dict and the name in it, and the parameter.

    ``torch.func.functional_call`` puts tensors into the same dicts (``Module._parameters``), for one call; vlmpo needs
    them there during the backward pass too.
    """
    places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    return [(kept, name, kept[name]) for kept, name in places if kept[name] is not None]


def version(tensor: Any) -> int:
    """Return a number that grows with every change of a tensor in place that autograd sees (``Tensor._version``)."""
    return int(tensor._version)


def copy_each(to: list[Any], of: list[Any]) -> None:
    """Copy tensors into others of the same shapes and any type, in one call (``torch._foreach_copy_``)."""
    import torch

    if to:
        torch._foreach_copy_(to, of)


def use_expandable_segments() -> None:
    """Let CUDA's memory grow in place (``expandable_segments``), unless the user has set how it is handed out.

    Rows differ in length from step to step, and memory that was cut for one does not fit the next: 15 GiB of 78 were
    lost so, and a step took a quarter longer. torch only reads a variable, before anything runs on the device
    (``torch._C._accelerator_setAllocatorSettings``, before torch 2.12 ``torch.cuda.memory._set_allocator_settings``).
    """
    import torch

    given = any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if given or sys.platform != "linux" or torch.version.cuda is None or not torch.cuda.is_available():
        return
    settle = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (settle or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def saved_tensors_are_hooked() -> bool:
    """Return whether something takes what autograd saves at present: checkpointing, offloading.

    ``torch.autograd.graph.saved_tensors_hooks`` only sets such hooks (``_top_saved_tensors_default_hooks``).
    """
    import torch

    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def run_backward_first(output: Any) -> None:
    """Let the function that made ``output`` run in a backward pass as soon as its gradients are there.

    Autograd runs what was called last first (``Node._sequence_nr``): a function that was called before the forward pass
    would run at the end, and all that while hold the gradients it was given.
    """
    output.grad_fn._set_sequence_nr(2**62)


def has_fast_bf16(device: Any) -> bool:
    """Return whether ``device`` computes products in bfloat16 natively.

    CUDA: from compute capability 8.0 on (older cards emulate them). A CPU: with AVX512-BF16 or AMX
    (``torch.cpu._is_avx512_bf16_supported``, ``_is_amx_tile_supported``), unless oneDNN, which computes the products,
    is held to an older instruction set by its variable ``ONEDNN_MAX_CPU_ISA``. Others: no.
    """
    import torch

    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if device.type != "cpu" or not any(name in most for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
