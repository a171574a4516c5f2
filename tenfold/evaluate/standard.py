"""Standard benchmarks through lm-evaluation-harness, on the live model with whatever is attached to it."""

from __future__ import annotations

import difflib
from typing import Any

from tenfold.engines.session import Session
from tenfold.errors import ConfigError, DataError, MissingDependencyError
from tenfold.models.inference import evaluating
from tenfold.stage.results import Metric, Result

_BOOTSTRAPS = 1000


def lm_eval_task(
    session: Session,
    name: str,
    *,
    limit: int | None = None,
    task_folder: str | None = None,
    subject: str = "model",
) -> list[Result]:
    """Run one task or group of lm-evaluation-harness.

    Args:
        session: a causal language model with what is attached to it: adapters, local spans, a packed cache. The
            harness writes its prompts itself, so nothing in them can be emphasised.
        name: the task's name, as ``lm_eval --tasks`` takes it.
        limit: documents per task; all by default.
        task_folder: a folder with task files of your own.
        subject: which model this is, for the report.

    Returns:
        One result for each task that ran, every metric with the harness's standard error.

    Raises:
        MissingDependencyError: when lm-evaluation-harness is not installed.
        ConfigError: for an unknown task, naming the nearest.
        DataError: when the task's data cannot be loaded.

    Example:
        >>> lm_eval_task(Session(model, tokenizer), "arc_easy", limit=100)[0].metric("acc").value  # doctest: +SKIP
        0.58
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingDependencyError(
            f"lm_eval:{name}: lm-evaluation-harness is not installed", remedy="pip install 'tenfold[eval]'"
        ) from None
    from tenfold.evaluate.harness import SessionLM

    manager = TaskManager(include_path=task_folder)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        raise ConfigError(
            f"lm_eval:{name}: lm-evaluation-harness has no task of this name",
            remedy=f"did you mean lm_eval:{near[0]}?" if near else "lm-eval ls tasks  lists them",
        )
    try:
        manager.load([name])
    except Exception as error:  # the hub's client and each task's own code raise what they like
        reason = (str(error) or "no reason given").splitlines()[0]
        raise DataError(
            f"lm_eval:{name}: its data cannot be loaded: {type(error).__name__}: {reason}",
            remedy="check the network: tasks fetch their data from the Hugging Face hub, once",
        ) from error
    tokenizer = session.tokenizer
    pad_token = tokenizer.pad_token
    try:
        with evaluating(session.model):
            found = lm_eval.simple_evaluate(
                model=SessionLM(session),
                tasks=[name],
                limit=limit,
                task_manager=manager,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                # Without these the harness seeds the process for everything that follows.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
    finally:
        tokenizer.pad_token = pad_token  # the harness gives the tokenizer one
    settings = {"harness": f"lm_eval {lm_eval.__version__}", "limit": limit, "batch_size": session.batch_size}
    settings |= {} if session.kv is None else {"kv": session.kv, "cache": session.notes[0]}
    return [_result(task, found, subject, settings) for task in found["results"]]


def _result(task: str, found: dict[str, Any], subject: str, settings: dict[str, Any]) -> Result:
    """One task of the harness's answer, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    values = found["results"][task]
    better = found.get("higher_is_better", {}).get(task, {})
    count = found.get("n-samples", {}).get(task, {}).get("effective")
    metrics = []
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        direction = {True: "higher", False: "lower"}.get(better.get(metric), "neither")
        metrics.append(
            Metric(
                name=metric if filtered == "none" else f"{metric} ({filtered})",
                value=value,
                count=count,
                stderr=stderr if isinstance(stderr, int | float) else None,
                better=direction,
            )
        )
    settings = {
        **settings,
        "version": found.get("versions", {}).get(task),
        "fewshot": found.get("n-shot", {}).get(task),
    }
    return Result(task=f"lm_eval:{task}", subject=subject, metrics=tuple(metrics), settings=settings)
