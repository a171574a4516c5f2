"""The model card beside an artefact: what it is, how to load it, what it cost and what it bought."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from tenfold.config.shape import Task
from tenfold.files import write_text
from tenfold.models.changes import is_compressed, is_marked
from tenfold.report.verdict import changes, half_width
from tenfold.stage import numbers
from tenfold.stage.record import StageSummary

CardKind = Literal["adapter", "model"]

AUTO_CLASSES: Mapping[str, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
}
HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")


def write_card(
    folder: Path,
    summary: StageSummary,
    *,
    base_model: str,
    recipe_text: str,
    kind: CardKind,
    task: Task = "causal",
    auto: str | None = None,
) -> Path:
    """Write ``README.md`` into the folder of an artefact.

    Args:
        folder: the artefact.
        summary: of the stage that made it.
        base_model: hub id of the model it was made from; of a path only the last part is written, for a path means
            nothing to the next reader.
        recipe_text: the resolved recipe.
        kind: ``adapter`` is loaded by PEFT on top of the base model, ``model`` by transformers; either by tenfold where
            the folder says that the model has local spans.
        task: what the model's head is for.
        auto: transformers' auto class that opens it, where that is not the one of its task.

    Returns:
        The path of the card.
    """
    path = folder / "README.md"
    text = card(
        summary,
        base_model=base_model,
        recipe_text=recipe_text,
        kind=kind,
        task=task,
        auto=auto,
        name=folder.name,
        gguf=next((file.name for file in folder.glob("*.gguf")), None),
        alone=not is_marked(folder),
        compressed=is_compressed(folder),
    )
    write_text(path, text)
    return path


def card(
    summary: StageSummary,
    *,
    base_model: str,
    recipe_text: str,
    kind: CardKind,
    name: str,
    task: Task = "causal",
    auto: str | None = None,
    alone: bool = True,
    compressed: bool = False,
    gguf: str | None = None,
) -> str:
    """The text of the card; arguments as in `write_card`, ``name`` is the folder's name in the code.

    ``gguf`` is the name of the file where the model is one.

    ``alone`` is False for what has local spans, and computes something else or does not open without tenfold;
    ``compressed`` is True for what has compressed layers, and does not open.

    >>> stage = StageSummary(tenfold_version="0.1.0", index=1, stage="lora", fingerprint="", config={}, seed=0)
    >>> card(stage, base_model="org/base", recipe_text="", kind="adapter", name="adapter").splitlines()[:3]
    ['---', 'base_model: org/base', 'library_name: peft']
    """
    base = _base(base_model)
    parts = [
        _header(summary, base, kind, alone and not compressed, gguf),
        f"# {_inline(base)} after `{summary.stage}`",
        _what(summary, base, kind),
        _loading(name, base, kind, task, auto or AUTO_CLASSES[task], alone, compressed)
        if gguf is None
        else _loading_gguf(name, gguf),
        _data(summary),
        _results(summary),
        "## Recipe\n\n" + _fence(recipe_text, "yaml"),
        _versions(summary),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _base(base_model: str) -> str:
    if HUB_ID.fullmatch(base_model):
        return base_model
    return PurePosixPath(base_model.replace("\\", "/")).name or base_model


def _header(summary: StageSummary, base: str, kind: CardKind, alone: bool, gguf: str | None) -> str:
    values: dict[str, Any] = {"base_model": base} if HUB_ID.fullmatch(base) else {}
    # The hub shows how to load a folder with the library of this name.
    plain = "peft" if kind == "adapter" else "transformers" if gguf is None else "gguf"
    values["library_name"] = plain if alone else "tenfold"
    values["tags"] = ["tenfold", summary.stage]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _what(summary: StageSummary, base: str, kind: CardKind) -> str:
    sort = "A PEFT adapter for" if kind == "adapter" else "A transformers model made from"
    lines = [f"{sort} {_inline(base)}, written by the stage `{summary.stage}` of tenfold {summary.tenfold_version}."]
    facts = {key: value for key, value in summary.attached.items() if isinstance(value, str | int | float)}
    if facts:
        lines += ["", "| what it touched | |", "| --- | ---: |"]
        lines += [
            f"| {_inline(key.replace('_', ' '))} | {_inline(numbers.named_unit(v, key))} |" for key, v in facts.items()
        ]
    model = summary.inputs.get("model")
    if kind == "adapter" and isinstance(model, Mapping) and "load" in model:
        packed = f"the weights of the base packed into {model['load']} (bitsandbytes)"
        lines += ["", f"It was trained on {packed}; it opens on whole ones too."]
    if summary.notes:
        lines += ["", *(f"- {_inline(note)}" for note in summary.notes)]
    return "\n".join(lines)


def _loading(name: str, base: str, kind: CardKind, task: Task, auto: str, alone: bool, compressed: bool) -> str:
    if alone and not compressed:
        code = "\n".join([_code(name, base, kind, auto), *_writing(task)])
        return "## Load it\n\nNo tenfold needed.\n\n" + _fence(code, "python")
    other = "PEFT would put it on the model without them" if kind == "adapter" else "transformers does not open it"
    lines = [
        "from tenfold import open_model",
        "",
        f"opened = open_model({name!r}, task={task!r})  # this folder",
        "model, tokenizer = opened.model, opened.tokenizer",
        *_writing(task),
    ]
    text = f"It needs tenfold: its layers have local spans, which are not part of transformers. {other}."
    if compressed:
        what = "it stands on a compressed model" if kind == "adapter" else "its layers are compressed"
        text = (
            f"It needs tenfold: {what}, whose files transformers alone refuses. `tenfold export --form dense` writes a "
            "plain model."
        )
    return f"## Load it\n\n{text}\n\n" + _fence("\n".join(lines), "python")


def _loading_gguf(name: str, file: str) -> str:
    llama = f"llama-cli -m {name}/{file}"
    code = "\n".join([
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name!r}, gguf_file={file!r})  # this folder",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r}, gguf_file={file!r})",
        *_writing("causal"),
    ])  # fmt: skip
    return (
        f"## Load it\n\nNo tenfold needed. llama.cpp runs the file as it is:\n\n{_fence(llama, 'sh')}\n\n"
        f"transformers opens it with whole weights, which compute the same:\n\n{_fence(code, 'python')}"
    )


def _code(name: str, base: str, kind: CardKind, auto: str) -> str:
    lines = [
        *(["from peft import PeftModel"] if kind == "adapter" else []),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"folder = {name!r}  # this folder",
    ]
    if kind == "adapter":
        lines += [
            f"base = {auto}.from_pretrained({base!r})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    else:
        lines.append(f"model = {auto}.from_pretrained(folder)")
    lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    return "\n".join(lines)


def _writing(task: Task) -> list[str]:
    if task not in ("causal", "seq2seq"):
        return []
    return [
        "",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))",
    ]


def _data(summary: StageSummary) -> str:
    data = summary.inputs.get("data")
    if not isinstance(data, Mapping):
        return ""
    rows = f", {data['rows']:,} rows" if isinstance(data.get("rows"), int) else ""
    hashed = f" (sha256 `{data['sha256']}`)" if "sha256" in data else ""
    return f"## Training data\n\n{_inline(_base(str(data.get('source', 'unknown'))))}{rows}{hashed}."


def _results(summary: StageSummary) -> str:
    items = changes(summary.results)
    if not items:
        return ""
    subjects = list(dict.fromkeys(subject for item in items for subject in item.subjects))
    lines = [
        "## Results",
        "",
        f"| task | metric | {' | '.join(map(_inline, subjects))} |",
        f"| --- | --- | {' | '.join('---:' for _ in subjects)} |",
    ]
    for item in items:
        scale = numbers.scale_for(
            [metric.value for metric in item.subjects.values()], item.unit, finest=item.difference
        )
        cells = []
        for subject in subjects:
            metric = item.subjects.get(subject)
            width = half_width(metric) if metric else None
            cells.append(scale.text(metric.value if metric else None) + (f" ± {scale.text(width)}" if width else ""))
        name = item.name.replace("_", " ") + (f" ({scale.unit})" if scale.unit else "")
        lines.append(f"| {_inline(item.task)} | {_inline(name)} | {' | '.join(cells)} |")
    if any(half_width(metric) for item in items for metric in item.subjects.values()):
        lines += ["", "± is half of a 95 % interval."]
    return "\n".join(lines)


def _versions(summary: StageSummary) -> str:
    versions = summary.environment.get("versions")
    shown = dict(versions) if isinstance(versions, Mapping) else {"tenfold": summary.tenfold_version}
    listed = ", ".join(f"{name} {version}" for name, version in shown.items())
    return f"## Versions\n\n{_inline(listed)}. Seed {summary.seed}. Fingerprint `{summary.fingerprint}`."


def _fence(text: str, language: str) -> str:
    """A code block whose fence is longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _inline(text: str) -> str:
    """Other people's text in Markdown: no tags, no columns of its own, one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
