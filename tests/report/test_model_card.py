import ast
import re

import pytest
import yaml

from tenfold.report.card import write_card

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parts(text):
    """Header, body and the first code block."""
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body, re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]


def test_an_adapter(tmp_path, run_stages, make_perplexity):
    stage = run_stages[0].model_copy(update={"results": tuple(make_perplexity(31.2034, 24.811))})
    path = write_card(tmp_path, stage, base_model=BASE, recipe_text="model: demo\n", kind="adapter")
    assert path == tmp_path / "README.md"
    header, body, code = parts(path.read_text(encoding="utf-8"))
    assert header == {"base_model": BASE, "library_name": "peft", "tags": ["tenfold", "lora"]}
    ast.parse(code)
    assert "PeftModel.from_pretrained(base, folder)" in code
    for expected in (
        "python-reference, 79 rows (sha256 `" + "9f" * 32,
        "| perplexity | perplexity | 31.2 ± 2.0 | 24.8 ± 2.0 |",
        "| trainable parameters | 538,000 |",
        "model: demo",
        "torch 2.13.0",
        "3 rows were cut.",
    ):
        assert expected in body


@pytest.mark.parametrize("task", ["causal", "seq2seq", "classification", "reward"])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_code_is_python_and_needs_no_tenfold(tmp_path, make_summary, kind, task):
    path = write_card(tmp_path, make_summary(), base_model=BASE, recipe_text="", kind=kind, task=task)
    header, _, code = parts(path.read_text(encoding="utf-8"))
    assert header["library_name"] == {"adapter": "peft", "model": "transformers"}[kind]
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert modules == ({"peft", "transformers"} if kind == "adapter" else {"transformers"})


@pytest.mark.parametrize("task", ["causal", "reward"])
@pytest.mark.parametrize(("kind", "file"), [("adapter", "adapter_config.json"), ("model", "config.json")])
def test_what_has_local_spans_is_loaded_by_tenfold(tmp_path, make_summary, kind, file, task):
    (tmp_path / file).write_text('{"tenfold_span": {"full_layers": [0]}}')
    path = write_card(tmp_path, make_summary(), base_model=BASE, recipe_text="", kind=kind, task=task)
    header, body, code = parts(path.read_text(encoding="utf-8"))
    assert header["library_name"] == "tenfold"
    assert "It needs tenfold" in body
    assert "No tenfold needed" not in body
    modules = {node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)}
    assert modules == {"tenfold"}
    assert f"open_model({tmp_path.name!r}, task={task!r})" in code


def test_paths_and_foreign_text(tmp_path, make_summary):
    stage = make_summary(
        notes=("<script>|x|",),
        inputs={"data": {"source": "/home/someone/private/rows.jsonl"}},
        attached={"a|b": "`c`\n<d>"},
    )
    path = write_card(
        tmp_path, stage, base_model="/home/someone/models/it's mine", recipe_text="x: |\n  ```\n  y\n", kind="adapter"
    )
    text = path.read_text(encoding="utf-8")
    header, body, code = parts(text)
    assert "base_model" not in header
    assert "someone" not in text
    assert "rows.jsonl" in body
    ast.parse(code)
    assert '"it\'s mine"' in code
    assert "<script>" not in body
    assert r"| a\|b | \`c\` &lt;d&gt; |" in body
    assert "````yaml" in body
