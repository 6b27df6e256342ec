"""Tokenizers and text towers in the style of each family, built on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.tiny_models import CORPUS


def tokenizer(special: Sequence[str], *, bos: str | None, eos: str, pad: str | None = None) -> Any:
    """Byte-level BPE over CORPUS that knows ``special``; writes ``bos``, where there is one, as Llama's does."""
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(CORPUS, trainer)
    named = [token for token in (bos, eos, pad) if token is not None]
    built.add_special_tokens(list(dict.fromkeys([*named, *special])))
    if bos is not None:
        built.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, built.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token=bos, eos_token=eos, pad_token=pad or eos, padding_side="left"
    )


def tower(tokens: Any, **changes: Any) -> dict[str, Any]:
    """Sizes of a tiny text tower for the vocabulary of ``tokens``."""
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    return {**sizes, **changes}


def finished(model: Any, tokens: Any) -> Any:
    """``model`` in eval mode, with the end and padding tokens generation needs."""
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    return model.eval()
