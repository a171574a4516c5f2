"""Small runs that learn from preferences of which some are wrong."""

import csv

FAST = {"steps": 6, "batch_size": 2, "learning_rate": 0.01, "save_every": 2, "log_every": 2}
TARGETS = {"reward": {"target": "reward", "rank": 2}, "dpo": {"target": "dpo", "rank": 2, "beta": 0.5}}
TARGETS["all weights"] = {"target": "reward", "rank": 0}


def recipe(*more, **keys):
    """Of R3M and the stages after it."""
    first = {"use": "r3m", "data": "step-audit:30", "holdout": 0.2, "noise": "uniform:20%", **FAST, **keys}
    return {"model": "tiny:llama", "stages": [first, *more]}


def table_of(path):
    """The lines of an audit's table, by the id of their row."""
    with path.open() as file:
        return {row["id"]: row for row in csv.DictReader(file)}
