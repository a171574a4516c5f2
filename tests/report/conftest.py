"""A small run with everything a report can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tenfold.stage.record import Figure, Sample, Series, StageSummary, Table
from tenfold.stage.results import Metric, Result

ENVIRONMENT = {"versions": {"tenfold": "0.1.0", "torch": "2.13.0"}, "devices": ["cpu"], "memory_bytes": 2**33}
INPUTS = {"model": {"weights": "a" * 64}, "data": {"source": "python-reference", "sha256": "9f" * 32, "rows": 79}}


def summary(**fields: Any) -> StageSummary:
    basis = {"tenfold_version": "0.1.0", "index": 1, "stage": "lora", "fingerprint": "5e" * 32, "config": {}, "seed": 0}
    return StageSummary(**{**basis, **fields})


def measured(task: str, before: dict[str, Any], after: dict[str, Any], **settings: Any) -> list[Result]:
    return [
        Result(task=task, subject=subject, metrics=(Metric(**metric),), settings=settings)
        for subject, metric in (("before", before), ("after", after))
    ]


def perplexity(before: float, after: float, interval: tuple[float, float] | None = None) -> list[Result]:
    same = {"name": "perplexity", "better": "lower", "stderr": 1.0, "count": 20_120}
    results = measured("perplexity", {**same, "value": before}, {**same, "value": after}, tokens=20_120)
    if interval is not None:
        metrics = (
            Metric(name="perplexity_ratio", value=0.8, interval=(0.78, 0.82), better="lower"),
            Metric(
                name="nll_difference", value=sum(interval) / 2, unit="nats/token", interval=interval, better="lower"
            ),
        )
        results.append(Result(task="perplexity", subject="after - before", metrics=metrics))
    return results


def stages() -> list[StageSummary]:
    speed = measured(
        "speed",
        {"name": "prefill", "value": 1204.0, "unit": "tokens/s", "better": "higher", "kind": "timing", "stderr": 9.0},
        {"name": "prefill", "value": 1187.0, "unit": "tokens/s", "better": "higher", "kind": "timing", "stderr": 9.0},
    )
    return [
        summary(
            config={"budget": "0.4%", "targets": ["all-linear"]},
            inputs=INPUTS,
            attached={
                "method": "LoRA",
                "trainable parameters": 538_000,
                "share of the model": 0.004,
                "bytes": 2_152_000,
            },
            notes=("3 rows were cut.",),
            artefact="adapter",
            continues_with="adapter",
            timings={"training": 181.2, "stage": 184.9},
            figures=(
                Figure(
                    kind="heatmap",
                    title="Rank",
                    series=(
                        Series(name="layer 0", x=("q", "k"), y=(1, None)),
                        Series(name="layer 1", x=("q",), y=(3,)),
                    ),
                ),
            ),
            environment=ENVIRONMENT,
        ),
        summary(
            index=2,
            stage="evaluate",
            config={"split": "held-out"},
            inputs=INPUTS,
            results=(*perplexity(31.2034, 24.811, (-0.245, -0.2135)), *speed),
            tables=(Table(title="Hardest", columns=("document", "nats"), rows=(("with", 4.1234), ("class", None))),),
            timings={"stage": 95.0},
            environment=ENVIRONMENT,
        ),
        summary(
            index=3,
            stage="generate",
            samples=(Sample(prompt="The with statement", outputs={"before": "is", "after": "wraps a block"}),),
            environment=ENVIRONMENT,
        ),
    ]


STEPS = [{"step": 5 * n, "loss": 3.0 - 0.1 * n, "learning_rate": 1e-3 / n, "grad_norm": 1.0} for n in range(1, 6)]


@pytest.fixture
def run_stages() -> list[StageSummary]:
    return stages()


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    return [dict(step) for step in STEPS]


@pytest.fixture
def make_summary() -> Callable[..., StageSummary]:
    return summary


@pytest.fixture
def make_perplexity() -> Callable[..., list[Result]]:
    return perplexity


@pytest.fixture
def make_measured() -> Callable[..., list[Result]]:
    return measured
