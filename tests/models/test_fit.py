"""Model and processor that do not belong together: one line names both; those that do give none."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.commands.test_train import call
from tests.tiny_models import CORPUS, noise_image, random_pair
from tests.tiny_models import model as internvl
from tests.tiny_models import processor as internvl_processor
from tests.training import config
from tests.zoo import FAMILIES, Family, gemma, qwen
from tests.zoo.words import tokenizer
from vlmpo import MPOTrainer, response_logps
from vlmpo.data.encode.encoder import PairEncoder
from vlmpo.data.records import Message, PreferencePair
from vlmpo.errors import ModelError, RecordError
from vlmpo.generate.base import Sampling
from vlmpo.generate.local import LocalEngine
from vlmpo.models.fit import check_config, check_features, check_processor, limits_of, limits_of_config
from vlmpo.testing.tiny import TinySize, build_processor, train_tokenizer

# Families whose tokenizers, and settings of images, are the same in the tests.
ALIKE = (
    {name for name in FAMILIES if name.startswith("internvl")},
    {name for name in FAMILIES if name.startswith("qwen") and FAMILIES[name].images},
    {"idefics3", "smolvlm"},
    {name for name in FAMILIES if not FAMILIES[name].images},
)


def check(model: Any, processor: Any) -> None:
    encoder = PairEncoder(processor, **limits_of(model))
    check_features(model, processor, check_processor(model, encoder))


def refused(model: Any, processor: Any) -> str:
    with pytest.raises(ModelError) as caught:
        check(model, processor)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: family.model(0) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_no_false_alarm(family: Family, models: dict[str, Any]) -> None:
    """Of the model itself, under an adapter, in half precision, with more words than the embedding has rows."""
    model = models[family.name]
    check(model, family.processor())
    check(copy.deepcopy(model).to(torch.bfloat16), family.processor())
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    check(adapted, family.processor())
    assert check_config(model.config, PairEncoder(family.processor(), **limits_of_config(model.config))) is not None
    larger = copy.deepcopy(family.processor())
    getattr(larger, "tokenizer", larger).add_tokens([f"word{number}" for number in range(100)])
    check(model, larger)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_other_familys_processor(family: Family, models: dict[str, Any]) -> None:
    for other in FAMILIES.values():
        alike = family is other or any({family.name, other.name} <= group for group in ALIKE)
        if not alike and (family.images or not other.images):  # a text model's records with images are refused below
            said = refused(models[family.name], other.processor())
            assert f"{models[family.name].config.model_type} model" in said
            assert type(other.processor()).__name__ in said or "TokenizersBackend" in said


# ---- images ----


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.images])
def test_a_tokenizer_alone(name: str, models: dict[str, Any]) -> None:
    assert "reads images, but" in refused(models[name], FAMILIES["qwen2-text"].processor())


@pytest.mark.parametrize("name", ["qwen2-text", "gemma3-text", "gemma2-text"])
def test_a_processor_with_a_text_model_reads_texts_only(name: str, models: dict[str, Any]) -> None:
    encoder = PairEncoder(FAMILIES["qwen2-vl"].processor(), **limits_of(models[name]))
    check_processor(models[name], encoder)
    assert encoder.encode(random_pair(1, images=0)).vision == {}
    with pytest.raises(RecordError, match="the record has images, and the model reads none") as caught:
        encoder.encode(random_pair(1))
    assert caught.value.reason == "images_unsupported"


@pytest.mark.parametrize("name", ["internvl-qwen2", "llava-next", "qwen3-vl", "idefics3"])
@pytest.mark.parametrize("token_id", [5, 100000])
def test_another_image_token(name: str, token_id: int) -> None:
    model, own = FAMILIES[name].model(0), FAMILIES[name].processor()
    written = model.config.image_token_id
    model.config.image_token_id = token_id
    said = refused(model, own)
    assert f"for an image it writes {own.tokenizer.convert_ids_to_tokens(written)!r} (token {written})" in said
    assert "the model reads one at" in said
    assert f"token {token_id}" in said


def test_other_numbers_of_features() -> None:
    """More tokens a tile, another downsampling, other patches or merging: tokens and features are counted."""
    own = internvl_processor()
    more = copy.copy(own)
    more.image_seq_length = 16
    assert "processor makes 16 tokens, the model's vision part 4 features" in refused(internvl(), more)
    downsampled = internvl()
    downsampled.config.downsample_ratio = downsampled.model.config.downsample_ratio = 1.0
    assert "do not fit" in refused(downsampled, own)
    pixtral, mistral = FAMILIES["pixtral"], FAMILIES["mistral3"]
    assert "makes 16 tokens, the model's vision part 4" in refused(mistral.model(0), pixtral.processor())
    for setting, value in (("patch_size", 16), ("merge_size", 1)):
        other = copy.copy(qwen.processor("qwen2_5_vl"))
        other.image_processor = copy.deepcopy(other.image_processor)
        setattr(other.image_processor, setting, value)
        assert "do not fit" in refused(FAMILIES["qwen2.5-vl"].model(0), other)


@pytest.mark.parametrize("name", ["internvl-qwen2", "llava-1.5", "gemma3"])
def test_another_number_of_channels(name: str) -> None:
    model = FAMILIES[name].model(0)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, torch.nn.Conv2d):
                setattr(module, child_name, torch.nn.Conv2d(1, child.out_channels, child.kernel_size, child.stride))
    assert "do not fit" in refused(model, FAMILIES[name].processor())


# ---- tokens beyond the embedding ----


def of_rows(rows: int) -> Any:
    """The tiny InternVL with an embedding of so many rows."""
    model = internvl()
    model.resize_token_embeddings(rows)
    return model


@pytest.mark.parametrize(
    ("without", "named"),
    [("<IMG_CONTEXT>", "'<IMG_CONTEXT>'"), ("<|im_start|>", "</img>"), ("<|im_end|>", "</img>")],
)
def test_a_token_of_the_template_or_the_image(without: str, named: str) -> None:
    tokens = internvl_processor().tokenizer
    rows = tokens.convert_tokens_to_ids(without)
    said = refused(of_rows(rows), internvl_processor())
    assert f"has only {rows} rows" in said
    assert "(token " in said


def test_the_token_that_ends_a_turn() -> None:
    own = copy.deepcopy(FAMILIES["llama-text"].processor())
    own.add_special_tokens({"eos_token": "<|done|>"})
    own.chat_template = own.chat_template.replace("<|im_end|>", "<|done|>")
    assert "'<|done|>'" in refused(FAMILIES["llama-text"].model(0), own)


def gemma_of(rows: int) -> tuple[Any, Any]:
    """A Gemma 3 of so many rows, and its processor, whose image token is the last of 356 tokens."""
    from transformers import Gemma3ForConditionalGeneration, Gemma3Processor, PreTrainedTokenizerFast

    names = {**gemma.IMAGE}
    image = names.pop("image_token")
    plain = tokenizer(["<start_of_turn>", *names.values(), image], bos="<bos>", eos="<end_of_turn>", pad="<pad>")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        extra_special_tokens=gemma.IMAGE,
    )
    own = Gemma3Processor(
        image_processor=gemma.processor().image_processor,
        tokenizer=tokens,
        image_seq_length=4,
        chat_template=gemma.TEMPLATE,
    )
    changed = gemma.gemma3(0).config
    changed.text_config.vocab_size = rows
    changed.image_token_id = tokens.convert_tokens_to_ids(image)
    changed.boi_token_id, changed.eoi_token_id = tokens.convert_tokens_to_ids(list(names.values()))
    return Gemma3ForConditionalGeneration(changed).eval(), own


def test_gemma_looks_its_image_tokens_up_nowhere() -> None:
    """It has another embedding in their place, so they may be beyond the vocabulary; other tokens may not."""
    model, own = gemma_of(355)
    assert model.config.image_token_id == 355
    check(model, own)
    assert all(value < 0 for logps in response_logps(model, own, [random_pair(1)]) for value in logps)
    assert "'<end_of_image>' (token 354)" in refused(*gemma_of(354))


class TestRecords:
    """A record's own token beyond the embedding: refused by name, as the others are not."""

    @pytest.fixture(scope="class")
    def encoder(self) -> PairEncoder:
        larger = copy.deepcopy(internvl_processor())
        larger.tokenizer.add_tokens(["<box>", "zebra", "縞馬"])
        return PairEncoder(larger, **limits_of(internvl()))

    @pytest.mark.parametrize(
        ("prompt", "chosen", "rejected", "named"),
        [
            ("what?", "a zebra", "a horse", "a response holds 'zebra', token 357"),
            ("what?", "a horse", "<box>1</box>", "a response holds '<box>', token 356"),
            ("<image>\nis it a zebra?", "yes", "no", "the prompt holds 'zebra', token 357"),
            ("what?", "縞馬", "馬", "a response holds '縞馬', token 358"),
        ],
    )
    def test_refused(self, encoder: PairEncoder, prompt: str, chosen: str, rejected: str, named: str) -> None:
        images = (noise_image(40, 40, 0),) * prompt.count("<image>")
        asked = PreferencePair((Message("user", prompt),), images, chosen, rejected, origin="pairs.jsonl:3")
        with pytest.raises(RecordError) as caught:
            encoder.encode(asked)
        assert caught.value.reason == "token_beyond_vocabulary"
        assert str(caught.value).startswith(f"pairs.jsonl:3: {named}")
        assert "has only 356 rows" in str(caught.value)

    def test_a_larger_tokenizer_alone_is_no_fault(self, encoder: PairEncoder) -> None:
        plain = PairEncoder(internvl_processor()).encode(random_pair(1))
        assert encoder.encode(random_pair(1)).prompt_ids.tolist() == plain.prompt_ids.tolist()

    def test_it_is_counted_and_the_run_goes_on(self, tmp_path: Path) -> None:
        larger = copy.deepcopy(internvl_processor())
        larger.tokenizer.add_tokens(["zebra"])
        good = random_pair(1)
        bad = PreferencePair((Message("user", "what?"),), (), "a zebra", "a horse", origin="pairs.jsonl:3")
        run = MPOTrainer(internvl(), args=config(tmp_path), train_dataset=[good, bad], processing_class=larger)
        batches = list(run.get_train_dataloader())
        assert [drop.error.reason for batch in batches for drop in batch.dropped] == ["token_beyond_vocabulary"]


# ---- special tokens ----


class TestSpecialTokens:
    """They decide only if nothing agrees; a default of a config's class proves nothing."""

    def text(self, **ids: Any) -> Any:
        model = FAMILIES["llama-text"].model(0)
        for name, value in ids.items():
            setattr(model.config, name, value)
            setattr(model.generation_config, name, value)
        return model

    @pytest.mark.parametrize(
        "ids",
        [
            {"eos_token_id": 3, "pad_token_id": 4},
            {"eos_token_id": 3, "pad_token_id": None},  # an ordinary word of this tokenizer
            {"eos_token_id": [5, 6], "pad_token_id": 7},
            {"eos_token_id": 351, "pad_token_id": 351},
        ],
    )
    def test_certainly_anothers(self, ids: dict[str, Any]) -> None:
        said = refused(self.text(**ids), FAMILIES["llama-text"].processor())
        assert "is not the tokenizer of the llama model: it has eos_token_id 349" in said

    @pytest.mark.parametrize(
        "ids",
        [
            {"eos_token_id": 3},  # padding agrees
            {"eos_token_id": [3, 349], "pad_token_id": 4},  # one of several
            {"eos_token_id": 350, "pad_token_id": None},  # the base model's end, a special token of this tokenizer
            {"eos_token_id": 2, "pad_token_id": None},  # LlamaConfig's default
            {"eos_token_id": None, "pad_token_id": None},
        ],
    )
    def test_perhaps_the_users_own(self, ids: dict[str, Any]) -> None:
        check(self.text(**ids), FAMILIES["llama-text"].processor())


# ---- wherever a model and a processor meet ----


def test_all_entrances(tmp_path: Path) -> None:
    fewer = copy.copy(internvl_processor())
    fewer.image_seq_length = 16
    with pytest.raises(ModelError, match="do not fit"):
        MPOTrainer(internvl(), args=config(tmp_path), processing_class=fewer)
    with pytest.raises(ModelError, match="do not fit"):
        response_logps(internvl(), fewer, [random_pair(1)])
    with pytest.raises(ModelError, match="do not fit"):
        LocalEngine(internvl(), fewer, Sampling(max_new_tokens=2)).check_vision()
    other = build_processor(train_tokenizer(CORPUS, vocab_size=300), TinySize(image_size=56, max_tiles=2))
    for enter in (
        lambda: MPOTrainer(internvl(), args=config(tmp_path), processing_class=other),
        lambda: response_logps(internvl(), other, []),
        lambda: LocalEngine(internvl(), other, Sampling(max_new_tokens=2)),
    ):
        with pytest.raises(ModelError, match="is not the processor of the internvl model"):
            enter()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model beside a processor whose tokenizer has one word more; two pairs, of which one holds it; a question."""
    root = tmp_path_factory.mktemp("folder")
    internvl().save_pretrained(root / "model")
    larger = copy.deepcopy(internvl_processor())
    larger.tokenizer.add_tokens(["zebra"])
    larger.save_pretrained(root / "model")
    lines = [
        {"question": "what?", "chosen": "a zebra", "rejected": "red"},
        {"question": "what?", "chosen": "red", "rejected": "blue"},
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "questions.jsonl").write_text('{"question": "what?", "answer": "red"}\n')
    (root / "recipe.yaml").write_text(
        f"model: {{path: {root / 'model'}}}\ndata: {{train: [pairs.jsonl]}}\n"
        f"build: {{questions: questions.jsonl, output_dir: {root / 'out'}}}\nevaluate: {{questions: questions.jsonl}}\n"
        f"training: {{output_dir: {root / 'run'}, use_cpu: true}}\n"
    )
    return root


def test_inspect_counts_a_record_with_a_token_beyond(folder: Path) -> None:
    result = call("inspect", str(folder / "recipe.yaml"))
    assert result.exit_code == 0, result.output
    assert "token_beyond_vocabulary" in result.output
    assert "pairs.jsonl:1: a response holds 'zebra', token 356" in result.output.replace("\n", " ")


@pytest.mark.parametrize("command", ["train", "inspect", "sample", "evaluate"])
def test_a_processor_of_another_model_ends_every_command(folder: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    FAMILIES["qwen2-vl"].processor().save_pretrained(tmp_path / "model")
    paths = [f"model.path={tmp_path / 'model'}", f"evaluate.model={tmp_path / 'model'}"]
    result = call(command, str(folder / "recipe.yaml"), *paths)
    assert result.exit_code == 2, result.output
    assert "is not the tokenizer of the internvl model" in result.output.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not (folder / "run").exists()


def test_a_reference_with_fewer_rows_bounds_the_records_too(tmp_path: Path) -> None:
    larger = copy.deepcopy(internvl_processor())
    larger.tokenizer.add_tokens(["zebra"])
    run = MPOTrainer(of_rows(400), ref_model=internvl(), args=config(tmp_path), processing_class=larger)
    assert run.encoder.vocabulary == 356
    with pytest.raises(ModelError, match="has only 350 rows"):
        MPOTrainer(internvl(), ref_model=of_rows(350), args=config(tmp_path), processing_class=internvl_processor())


def test_the_probe_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    model = internvl().train()
    torch.manual_seed(3)
    check(model, internvl_processor())
    assert torch.equal(torch.rand(4), expected)
    assert model.training
