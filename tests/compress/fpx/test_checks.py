"""What no file can be is refused before anything is measured; plans of earlier runs are used only where they fit."""

import json
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tenfold.compress.fpx import checks
from tenfold.compress.fpx.checks import refuse_unplannable, smallest_file
from tenfold.compress.fpx.plan import Plan, plan
from tenfold.config.fpx import FpxConfig
from tenfold.errors import ConfigError, DataError, MissingDependencyError, ModelError
from tenfold.models.export import save_model
from tenfold.models.gguf_write import gguf_sizes, write_gguf
from tenfold.models.meta_model import meta_model
from tenfold.models.reference import ModelRef
from tenfold.models.tiny import tiny_model

from ...runs import execute

IDS = torch.randint(6, 262, (64,), generator=torch.Generator().manual_seed(0))
PALETTE = ("q8_0", "q5_1", "q4_0")


def asked(**keys):
    return FpxConfig.parse({"palette": PALETTE, **keys}, "test")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_smallest_file_is_the_smallest_that_is_written(kind, tmp_path):
    """Rows of 40 numbers divide by no block, so that half precision stands in for all types there."""
    opened = tiny_model(kind, num_hidden_layers=1, **({"intermediate_size": 40} if kind == "llama" else {}))
    matrices = [one.module for one in gguf_sizes(opened.model, "f16").tensors if one.module]
    least = smallest_file(opened.model, opened.tokenizer, PALETTE)
    sizes = {
        gguf_sizes(opened.model, dict(zip(matrices, types, strict=True)), opened.tokenizer).total
        for types in product(PALETTE, repeat=len(matrices))
        if types.count("q5_1") < 2
    }
    assert least == min(sizes)
    written = write_gguf(opened.model, opened.tokenizer, tmp_path / "m.gguf", "q4_0")
    assert written.total == least == (tmp_path / "m.gguf").stat().st_size


def test_a_byte_less_is_refused_with_and_without_weights_and_what_is_said_then_works(tmp_path):
    opened = tiny_model("llama")
    least = smallest_file(opened.model, opened.tokenizer, PALETTE)
    for model in (opened.model, meta_model(ModelRef("tiny:llama"))):
        refuse_unplannable(model, asked(budget=f"{least}B"), lambda: opened.tokenizer)
        with pytest.raises(ConfigError, match=f"budget: {least - 1}B is .* q8_0, q5_1, q4_0 takes {least:,}") as caught:
            refuse_unplannable(model, asked(budget=f"{least - 1}B"), lambda: opened.tokenizer)
        bits = caught.value.remedy.split()[1]
        refuse_unplannable(model, asked(budget=bits), lambda: opened.tokenizer)
    found = plan(opened.model, [IDS], budget=bits, palette=PALETTE, codec="gguf", tokenizer=opened.tokenizer)
    assert found.bytes == least


def test_types_that_cannot_be_written_here_are_not_counted_on(monkeypatch):
    def absent(name):
        raise MissingDependencyError("no ggml", "install it")

    opened = tiny_model("llama", hidden_size=256, num_hidden_layers=1)
    with_k = smallest_file(opened.model, opened.tokenizer, checks.PALETTE)
    monkeypatch.setattr(checks, "gguf_format", absent)
    with pytest.raises(ConfigError, match="smallest plan of q8_0, q5_1, q5_0, q4_1, q4_0, mxfp4 takes"):
        refuse_unplannable(opened.model, asked(palette=(), budget=f"{with_k}B"), lambda: opened.tokenizer)


def test_architectures_and_tokenizers_that_no_file_knows():
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be written as GGUF"):
        refuse_unplannable(meta_model(ModelRef("tiny:gpt2")), asked(budget="9bits"), ModelRef("tiny:gpt2").tokenizer)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="tokenizers of type WordLevel"):
        refuse_unplannable(meta_model(ModelRef("tiny:llama")), asked(budget="9bits"), lambda: words)


def saved_plan(path, kind="llama", codec="gguf", palette=PALETTE, **options):
    opened = tiny_model(kind, **options)
    keys = {"palette": palette, "codec": codec, **({"tokenizer": opened.tokenizer} if codec == "gguf" else {})}
    plan(opened.model, [IDS], budget="20bits", **keys).save(path)
    return str(path)


def test_plans_of_other_models_and_formats_are_refused_without_a_weight(tmp_path):
    model, tokenizer = meta_model(ModelRef("tiny:llama")), ModelRef("tiny:llama").tokenizer
    (tmp_path / "damaged.json").write_text('{"fpx_plan": 1, "uni')
    cases = [
        (saved_plan(tmp_path / "qwen.json", "qwen2"), ConfigError, "is of a qwen2 model .* than this llama model"),
        (saved_plan(tmp_path / "wide.json", intermediate_size=160), ConfigError, "is of a llama model with other"),
        (
            saved_plan(tmp_path / "here.json", codec="reference", palette=("fp8_row", "nvfp4")),
            ConfigError,
            "is of fp8_row and nvfp4, which GGUF",
        ),
        (str(tmp_path / "damaged.json"), DataError, r"damaged\.json: not readable"),
        (str(tmp_path / "nothing.json"), DataError, r"nothing\.json"),
    ]
    for path, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            refuse_unplannable(model, FpxConfig(plan=path, budget="9bits"), tokenizer)
        assert caught.value.remedy
    own = saved_plan(tmp_path / "own.json", palette=("q8_0",))
    refuse_unplannable(model, FpxConfig(plan=own, budget="9.1bits"), tokenizer)
    with pytest.raises(ConfigError, match="smallest plan of q8_0 takes"):  # its own types, not those of today
        refuse_unplannable(model, FpxConfig(plan=own, budget="6bits"), tokenizer)
    for key in ({"palette": ("q4_0",)}, {"metric": "kl"}):
        with pytest.raises(ConfigError, match=f"{next(iter(key))}: the plan has its own"):
            FpxConfig.parse({"plan": own, **key}, "test")


def stage(rows, **keys):
    return {"use": "fpx", "data": str(rows), "holdout": 0.3, "max_length": 48, "calibration": 256, **keys}


def test_a_plan_of_an_earlier_stage_answers_without_a_pass(number_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    first = stage(number_rows, id="first", budget="7bits", palette=["q8_0", "q5_1", "q4_0"])
    again = stage(number_rows, model="tiny:llama", budget="5.5bits", calibration=128, plan="${first.plan}")
    execute({"model": "tiny:llama", "stages": [first, again]}, tmp_path / "run")
    one, other = (Plan.load(tmp_path / f"run/{name}-fpx/plan.json") for name in ("01", "02"))
    assert other == one.replan("5.5bits")
    with pytest.raises(ConfigError, match=r"plan\.json is of a llama model with other matrices than this qwen2 model"):
        execute({"model": "tiny:llama", "stages": [first, {**again, "model": "tiny:qwen2"}]}, tmp_path / "other")


def test_the_same_matrices_with_other_numbers_or_words_around_them(number_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    path = saved_plan(tmp_path / "plan.json")
    other = tiny_model("llama", seed=1)
    save_model(other.model, other.tokenizer, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"plan\.json was made for other weights than these of .*other"):
        execute(
            {"model": str(tmp_path / "other"), "stages": [stage(number_rows, plan=path, budget="6bits")]},
            tmp_path / "wrong",
        )
    same = tiny_model("llama")
    same.tokenizer.chat_template = json.dumps("x" * 5000)
    save_model(same.model, same.tokenizer, tmp_path / "same")
    known = Plan.load(path)
    recipe = {"model": str(tmp_path / "same"), "stages": [stage(number_rows, plan=path, budget=f"{known.bytes}B")]}
    execute(recipe, tmp_path / "run")
    size = (tmp_path / "run/01-fpx/model/model.gguf").stat().st_size
    assert size == Plan.load(tmp_path / "run/01-fpx/plan.json").bytes <= known.bytes
