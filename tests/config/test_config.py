"""What holds for every configuration, those of installed stages included."""

import subprocess
import sys

import pytest
import yaml

from tenfold.config.adalora import AdaLoraPaper
from tenfold.config.base import Config
from tenfold.config.reading import read_yaml, write_yaml
from tenfold.config.recipe import Recipe
from tenfold.config.training import TrainingFields
from tenfold.errors import ConfigError
from tenfold.pipeline.stages import stages

CONFIGS = dict(stages()) | {"recipe": Recipe}
GROUPS = {(name, group): kind for name, config in stages().items() for group, kind in config.groups().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_documented(name):
    missing = [key for key, field in CONFIGS[name].model_fields.items() if not field.description]
    assert not missing


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_a_recipe_from_before_there_were_groups_is_read(name, group):
    """All defaults are spelled out in the recipe of a run, keys of the group beside the others."""
    values = CONFIGS[name]().model_dump(mode="json")
    flat = values | values.pop(group)
    assert CONFIGS[name].parse(flat, "test") == CONFIGS[name]()


def test_a_key_of_a_group_counts_beside_it_and_within():
    values = [{"init": "normal"}, {"paper": {"init": "normal"}}, {"paper": AdaLoraPaper(init="normal")}]
    assert {CONFIGS["adalora"].parse(value, "test").paper.init for value in values} == {"normal"}
    mixed = CONFIGS["adalora"].parse({"init": "normal", "paper": {"sensitivity_at": "before"}}, "test")
    assert mixed.paper == AdaLoraPaper(init="normal", sensitivity_at="before")
    for paper in ({"init": "lora"}, AdaLoraPaper(init="lora")):
        with pytest.raises(ConfigError, match=r"init and paper\.init are one key"):
            CONFIGS["adalora"].parse({"init": "normal", "paper": paper}, "test")


def test_what_is_wrong_in_a_group_is_named_with_it():
    with pytest.raises(ConfigError) as caught:
        CONFIGS["r3m"].parse({"paper": {"smoothing": 0.9}, "lam_warmup": 2}, "test")
    assert "test: paper.smoothing: must be below 0.5, got 0.9" in caught.value.problem
    assert "test: paper.lam_warmup: must be below" in caught.value.problem
    assert caught.value.remedy.startswith("paper.smoothing: Share of labels")
    for wrong in ({"paper": {"smothing": 0.1}}, {"smothing": 0.1}):
        with pytest.raises(ConfigError, match=r"smothing: unknown key; did you mean 'paper\.smoothing'"):
            CONFIGS["r3m"].parse(wrong, "test")
    with pytest.raises(ConfigError, match="paper: names and values are asked for"):
        CONFIGS["r3m"].parse({"paper": "rdpo", "smoothing": 0.1}, "test")


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_every_field_of_a_group_is_documented(name, group):
    assert all(field.description for field in GROUPS[name, group].model_fields.values())


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
        "[s for s in stages().values()];"
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


class Numbers(Config):
    """One field of each kind."""

    rank: int | None = None
    """A whole number."""
    rate: float = 1.0
    """A number."""
    packing: bool = True
    """Yes or no."""
    layers: tuple[int, ...] = ()
    """Whole numbers."""
    span: int | float = 1
    """Steps or a share."""
    name: str | None = None
    """Text."""
    columns: dict[str, str] = {}
    """Names."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: yes", "rank: a whole number is asked for, got True (YAML reads yes"),
        ("rank: '8'", "rank: a whole number is asked for, got '8'"),
        ("rank: 8.0", "rank: a whole number is asked for, got 8.0"),
        ("rank: [8]", "rank: a whole number is asked for, got [8]"),
        ("layers: [true]", "layers.0: a whole number is asked for, got True"),
        ("layers: 3", "layers: a list is asked for, such as [3], got 3"),
        ("layers: q", "layers: a list is asked for, such as [q], got 'q'"),
        ("rate: yes", "rate: a number is asked for, got True"),
        ("rate: '1'", "rate: a number is asked for, got '1'"),
        ("rate: .nan", "rate: a finite number is asked for, got nan"),
        ("rate: .inf", "rate: a finite number is asked for, got inf"),
        ("rate: 1e999", "rate: a finite number is asked for, got inf"),
        ("span: true", "number is asked for, got True"),
        ("span: .nan", "number is asked for, got nan"),
        ("packing: 1", "packing: true or false is asked for, got 1"),
        ("packing: 'no'", "packing: true or false is asked for, got 'no'"),
        ("name: 3", "name: text is asked for, got 3"),
        ("name: yes", "name: text is asked for, got True"),
        ("columns: [a]", "columns: names and values are asked for, as in {name: value}"),
    ],
)
def test_numbers_and_truth_values_are_strict(text, message):
    with pytest.raises(ConfigError) as caught:
        Numbers.parse(read_yaml(text), "recipe.yaml")
    line = str(caught.value).splitlines()[0]
    assert line.startswith("recipe.yaml: ")
    assert message in line
    assert caught.value.remedy.startswith(text.partition(":")[0]), "the remedy says what the key means"


def test_what_people_write_for_numbers():
    found = Numbers.parse(read_yaml("{rank: 1e3, rate: 1e-3, layers: [0, 2], span: 0.5, packing: no}"), "test")
    assert (found.rank, found.rate, found.layers, found.span, found.packing) == (1000, 0.001, (0, 2), 0.5, False)
    assert Numbers.parse(read_yaml("rate: 3"), "test").rate == 3
    assert Numbers.parse(read_yaml("rate: .5E-1"), "test").rate == 0.05


def test_python_is_strict_as_well():
    with pytest.raises(ValueError, match="valid integer"):
        TrainingFields(steps=True)


@pytest.mark.parametrize("text", ["1e3", "1e-3", "12", "no", "1_000", "a: b", "0x10", "~"])
def test_texts_that_look_like_numbers_survive_the_resolved_recipe(text):
    assert read_yaml(write_yaml({"prompts": [text]})) == {"prompts": [text]}


@pytest.mark.parametrize("value", [1e-5, 1e22, 3, True, None, 0.1, -2.5e-7])
def test_values_survive_the_resolved_recipe(value):
    found = read_yaml(write_yaml([value]))[0]
    assert (found, type(found)) == (value, type(value))


def test_yes_and_no_are_choices_too():
    assert CONFIGS["generate"].parse(read_yaml("chat: no"), "test").chat == "no"


def test_a_wrong_choice_names_the_nearest():
    with pytest.raises(ConfigError, match="schedule: must be 'linear', 'cosine' or 'constant', got 'cosin'; did you"):
        TrainingFields.parse({"schedule": "cosin"}, "test")


def test_what_is_wrong_between_keys_explains_both():
    with pytest.raises(ConfigError, match="steps and tokens both") as caught:
        TrainingFields.parse({"steps": 3, "tokens": 4}, "test")
    assert "steps: Optimizer steps" in caught.value.remedy
    assert "tokens: Training tokens" in caught.value.remedy


@pytest.mark.parametrize("name", sorted(stages()))
def test_every_number_of_every_stage_refuses_a_truth_value(name):
    config = CONFIGS[name]
    for key, field in config.model_fields.items():
        kinds = str(field.annotation)
        if ("int" in kinds or "float" in kinds) and "bool" not in kinds:
            wrong = [True] if "tuple" in kinds else True
            with pytest.raises(ConfigError, match=key):
                config.parse({key: wrong}, "test")
