"""What holds for every configuration, those of installed stages included."""

import subprocess
import sys

import pytest
import yaml

from tenfold.config.base import Config
from tenfold.config.recipe import Recipe
from tenfold.config.training import TrainingFields
from tenfold.errors import ConfigError
from tenfold.pipeline.stages import stages

CONFIGS = {name: stage.config_class() for name, stage in stages().items()} | {"recipe": Recipe}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_documented(name):
    missing = [key for key, field in CONFIGS[name].model_fields.items() if not field.description]
    assert not missing


@pytest.mark.parametrize("name", sorted(stages()))
def test_defaults_survive_yaml(name):
    config = CONFIGS[name]()
    written = yaml.safe_dump(config.model_dump(mode="json"))
    assert CONFIGS[name].parse(yaml.safe_load(written), "test") == config


@pytest.mark.parametrize("name", sorted(stages()))
def test_an_unknown_key_names_the_nearest(name):
    key = max(CONFIGS[name].model_fields, key=len)
    with pytest.raises(ConfigError, match=f"{key[:-1]}: unknown key; did you mean '{key}'"):
        CONFIGS[name].parse({key[:-1]: 1}, "test")


def test_frozen():
    config = TrainingFields()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainingFields.parse({"batch_size": 0, "learning_rate": "fast", "stepz": 1}, "recipe.yaml, stage 1 (lora)")
    text = str(caught.value)
    assert all(part in text for part in ("batch_size", "learning_rate", "'fast'", "stepz", "steps", "stage 1 (lora)"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("pair", [("steps", "epochs"), ("steps", "tokens"), ("epochs", "tokens")])
def test_two_lengths_of_a_run_are_refused(pair):
    with pytest.raises(ConfigError, match=f"{pair[0]} and {pair[1]}"):
        TrainingFields.parse(dict.fromkeys(pair, 3), "test")


def test_configurations_load_neither_torch_nor_transformers():
    code = (
        "import sys, tenfold; from tenfold.pipeline.stages import stages;"
        "[s.config_class() for s in stages().values()];"
        "bad = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_subclasses_are_strict_by_inheritance():
    class Example(Config):
        """An example."""

        rank: int = 1
        """Its rank."""

    with pytest.raises(ConfigError, match="valid keys: rank"):
        Example.parse({"other": 1}, "test")
