"""Fixtures that several rooms share."""

import json
import os
from pathlib import Path

import pytest
from _pytest.doctest import DoctestModule

# Nothing here may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny tensors: a second thread only waits for the first, and on a busy machine it waits long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("TENFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TENFOLD_DATA")
    return folder


@pytest.fixture(scope="session")
def number_rows(tmp_path_factory) -> Path:
    """A small text file of forty rows that even a tiny model can learn something from."""
    path = tmp_path_factory.mktemp("rows") / "numbers.jsonl"
    rows = [{"text": f"{n} squared is {n * n}; {n} cubed is {n**3}. " * 4} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pytest_collection_modifyitems(items):
    """Say of tests of a GPU that there is none, instead of letting them fail."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """Tests hold no doctests; looking for some would make a test file that cannot be imported a silent skip."""
    return [found for found in (yield) if not isinstance(found, DoctestModule)]
