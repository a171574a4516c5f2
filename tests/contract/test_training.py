"""What every method does that trains: it goes on from its last checkpoint, and says what it trained."""

import json

import pytest

from tenfold.models.tiny import tiny_model

from .rows import params

trained = pytest.mark.parametrize("row", params(lambda row: row.trains))


@trained
def test_it_goes_on_from_its_last_checkpoint(row, resumed):
    steps = {path for path in resumed(row).left[0] if path.startswith("checkpoint-") and path.endswith("/.complete")}
    assert steps == {f"checkpoint-{row.config.save_every}/.complete"}


@trained
def test_the_log_of_a_resumed_training_is_that_of_one_that_was_not_stopped(row, whole, resumed):
    logs = [(made(row).folder / "metrics.jsonl").read_text().splitlines() for made in (whole, resumed)]
    assert logs[0] == logs[1]
    assert all("loss" in json.loads(line) for line in logs[0])


@trained
def test_trains_in_bfloat16(row, in_bfloat16):
    results = in_bfloat16(row).summary.results
    losses = [metric.value for result in results for metric in result.metrics if metric.name == "loss"]
    assert losses
    assert min(losses) > 0


@pytest.mark.parametrize("row", params(lambda row: row.trains and row.attachment))
def test_what_it_counts_as_trained_is_what_learns(row):
    opened = tiny_model("llama")
    with row.attachment.on(opened, {}) as attached:
        learning = [parameter for parameter in opened.model.parameters() if parameter.requires_grad]
        assert attached.report()["trainable parameters"] == sum(parameter.numel() for parameter in learning)
