"""What can be done with a stranger's model: every cell of the table works, or is refused by name; never a traceback.

Each cell runs as a recipe does, without the page of the report. All cells of `FIRST` run by default and the rest of the
trainings with `make test-slow`; what takes a tenth of a second runs for all.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import peft
import pytest
import torch

from tenfold import cli
from tenfold.adapt import lora
from tenfold.config.lora import LoraConfig
from tenfold.errors import ConfigError, ModelError
from tenfold.models.generation import decoding, left_padded
from tenfold.models.open import open_model
from tenfold.models.scoring import Window, score
from tenfold.pipeline import run as runner
from tests.architectures import OPERATIONS, REASONS, TABLE, save, stock
from tests.runs import execute

FIRST = ("bloom", "gptj", "qwen3_moe", "deepseek_v3", "mamba", "qwen3_next", "recurrent_gemma")
"""Of each kind one or two, and those that differ most from Llama."""
TRAININGS = ("lora", "adalora", "full", "export", "evaluate", "reward")
TRAINED = {"max_length": 48, "batch_size": 2, "learning_rate": 0.02, "steps": 2}
ADAPTED = {**TRAINED, "rank": 2}
PAIRS = {"data": "step-audit:12", "target": "reward", "rank": 2, "steps": 2, "batch_size": 2, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No page is drawn, and collecting garbage passes over what is there already."""
    monkeypatch.setattr(runner, "write_report", lambda *arguments, **keys: None)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by architecture, made on first use, and a file of rows."""
    home, made = tmp_path_factory.mktemp("architectures"), {}
    lines = [{"text": f"{n} squared is {n * n}; {n} cubed is {n**3}. " * 4} for n in range(12)]
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def folder(row):
        if row.model_type not in made:
            made[row.model_type] = save(row, home / row.model_type)
        return made[row.model_type]

    return folder, home / "rows.jsonl"


def stages(operation, row, rows, folder):
    """The stages of a recipe that does it."""
    data = {"data": str(rows)}
    heads = folder / "heads.json"
    heads.write_text(json.dumps({"2" if row.model_type == "recurrent_gemma" else "1": [0, 2]}))
    short = {"max_new_tokens": 4, "prompts": ["Name a fruit. In one word."]}
    return {
        "lora": [{"use": "lora", **ADAPTED, **data}],
        "adalora": [{"use": "adalora", **ADAPTED, **data, "steps": 3}],
        "full": [{"use": "full", **TRAINED, **data}],
        "export": [{"use": "lora", **ADAPTED, **data}, {"use": "export"}],
        "evaluate": [{"use": "evaluate", **data, "tasks": ["perplexity", "speed", "memory"], "prompt_tokens": 24,
                      "new_tokens": 2, "repeats": 1, "max_length": 64}],
        "generate": [{"use": "generate", **short}],
        "steer": [{"use": "generate", **short, "profile": str(heads), "emphasise": ["In one word."]}],
        "gear": [{"use": "generate", **short, "kv": "gear:4,kernel=torch,buffer=16"}],
        "lengthen": [{"use": "masformer", **data, "budget": "50%", "window": 8, "passage": 16, "passages": 1}],
        "reward": [{"use": "r3m", **PAIRS}],
    }[operation]  # fmt: skip


def cells():
    for row in TABLE:
        for operation in OPERATIONS:
            if operation != "open":
                later = operation in TRAININGS and row.model_type not in FIRST and operation not in row.refused
                marks = [pytest.mark.slow] if later else []
                yield pytest.param(row, operation, id=f"{row.model_type}-{operation}", marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "operation"), list(cells()))
def test_cell(row, operation, models, tmp_path):
    folder, rows = models
    recipe = {"model": str(folder(row)), "device": "cpu", "stages": stages(operation, row, rows, tmp_path)}
    out = tmp_path / "run"
    if operation in row.refused:
        with pytest.raises((ModelError, ConfigError)) as caught:
            execute(recipe, out)
        assert REASONS[row.refused[operation]] in caught.value.problem
        assert caught.value.remedy
        assert "\n" not in caught.value.problem + caught.value.remedy
        return
    summaries = execute(recipe, out)
    assert all(summary.results or summary.samples or summary.artefact for summary in summaries)
    if operation in ("lora", "adalora"):
        said = " ".join(summaries[0].notes)
        stacked = any(p.ndim == 3 and ".experts." in name for name, p in plain(folder(row)).named_parameters())
        assert ("stacked experts stay as they are" in said) == stacked
    if operation == "evaluate":
        found = {metric.name for result in summaries[0].results for metric in result.metrics}
        assert {"perplexity", "prefill", "weights"} <= found
        assert ("cache" in found) == (row.kind != "recurrent" and row.model_type != "recurrent_gemma")
    if operation == "export":
        same_logits(folder(row), out / "01-lora/adapter", out / "02-export/model")


def plain(folder):
    kind = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    return stock(kind).from_pretrained(folder).float().eval()


@torch.no_grad()
def same_logits(base, adapter, merged):
    """Of the merged folder in transformers, and of the adapter in PEFT; not those of the base."""
    ids = torch.arange(10, 40)[None]
    before = plain(base)(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(plain(base), adapter).eval()(input_ids=ids).logits
    torch.testing.assert_close(plain(merged)(input_ids=ids).logits, adapted, atol=1e-5, rtol=1e-4)
    assert (adapted - before).abs().max() > 1e-4


def sharpened(folder):
    """Opened as a user would, with weights so large that contexts tell predictions apart."""
    opened = open_model(folder, device="cpu")
    with torch.no_grad():
        for name, parameter in opened.model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "A_log" not in name:
                parameter.mul_(6)
    return opened


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.model_type)
def test_a_batch_of_unequal_texts_is_each_alone(row, models):
    """Filled on the right where texts are scored, on the left where they are continued."""
    opened = sharpened(models[0](row))
    windows = [Window(opened.tokenizer("a text " * count + "zq")["input_ids"], 1) for count in (1, 4, 9)]
    together = score(opened.model, windows, pad_id=0, batch_size=3)
    for window, found in zip(windows, together, strict=True):
        torch.testing.assert_close(found, score(opened.model, [window], pad_id=0)[0], atol=1e-4, rtol=0)
    prompts = ["Hi", "A longer prompt than that"]
    written = continued(opened, prompts)
    for place, prompt in enumerate(prompts):
        torch.testing.assert_close(written[place], continued(opened, [prompt])[0], atol=1e-3, rtol=0)


@torch.no_grad()
def continued(opened, prompts):
    """Log-probabilities ``[prompts, tokens, vocabulary]`` of what is written after each."""
    config = decoding(opened.model, opened.tokenizer, 3)
    config.update(return_dict_in_generate=True, output_logits=True, min_new_tokens=3)
    inputs = left_padded(opened.tokenizer, prompts, special=True, device=torch.device("cpu"))
    return torch.stack(opened.model.generate(**inputs, generation_config=config).logits, 1).log_softmax(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.model_type)
def test_every_adapted_matrix_learns(row, models):
    """In training: an adapter on a layer that is read, not called, would have no gradient."""
    model = lora.attach(sharpened(models[0](row)).model, LoraConfig(rank=2)).train()
    ids = torch.arange(10, 34)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    dead = [name for name, p in model.named_parameters() if ".lora_B." in name and not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["bloom", "qwen3_moe", "mamba"])
def test_from_the_command_line(model_type, models, tmp_path, capsys):
    row = next(row for row in TABLE if row.model_type == model_type)
    folder, rows = models
    given = ["--data", rows, "--rank", 2, "--steps", 2, "--max-length", 48, "--out", tmp_path / "run"]
    assert cli.main([str(word) for word in ("adapt", folder(row), "--method", "lora", *given)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ("stacked experts stay as they are" in said) == (model_type == "qwen3_moe")
    adapter = tmp_path / "run/01-lora/adapter"
    assert cli.main(["generate", str(adapter), "--prompts", "Hello", "--out", str(tmp_path / "text")]) == 0
    if "steer" in row.refused:
        words = ["generate", str(folder(row)), "--prompts", "Hi you", "--kv", "gear:4", "--out", str(tmp_path / "no")]
        capsys.readouterr()
        assert cli.main(words) != 0
        assert "attention interface" in " ".join(capsys.readouterr().err.split())
