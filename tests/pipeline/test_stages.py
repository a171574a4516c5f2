import pytest

from tenfold.errors import ConfigError
from tenfold.pipeline import stages as registry


@pytest.fixture
def entry_points(monkeypatch):
    """Let installed packages offer these stages."""
    registry.stages.cache_clear()

    def offer(*points):
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    yield offer
    registry.stages.cache_clear()


class Point:
    def __init__(self, name, found):
        self.name, self.value, self._found = name, "package.module:STAGE", found

    def load(self):
        return self._found


def test_another_package_adds_a_stage(entry_points):
    mine = registry.Stage(verb="adapt", summary="mine", config="tenfold.config.lora:LoraConfig", run="package:run")
    entry_points(Point("mine", mine))
    assert registry.stage("mine") is mine
    assert registry.stage("mine").config_class().__name__ == "LoraConfig"


def test_a_taken_name_is_refused(entry_points):
    entry_points(Point("lora", registry.BUILT_IN["lora"]))
    with pytest.raises(ConfigError, match="registered already"):
        registry.stages()


def test_something_else_than_a_stage_is_refused(entry_points):
    entry_points(Point("mine", object()))
    with pytest.raises(ConfigError, match="not a tenfold Stage"):
        registry.stages()


def test_every_built_in_stage_resolves():
    for name, found in registry.BUILT_IN.items():
        assert callable(found.function()), name
        assert found.config_class()().model_dump() is not None
