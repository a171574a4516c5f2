"""What keeps full attention: a share, or a whole number, and nothing else."""

import pytest

from tenfold.config.masformer import MasformerConfig
from tenfold.errors import ConfigError


@pytest.mark.parametrize(
    ("budget", "layers", "full"),
    [
        ("25%", 30, 7),
        ("6", 30, 6),
        (6, 30, 6),
        ("1%", 30, 1),
        ("90%", 30, 27),
        ("29%", 100, 29),
        ("0", 30, 0),
        ("100%", 30, 30),
    ],
)
def test_counts(budget, layers, full):
    assert MasformerConfig(budget=budget).count(layers) == full


@pytest.mark.parametrize(("budget", "remedy"), [(0.25, "write 25%"), ("0.9", "write 90%"), ("2.5", "not whole")])
def test_a_fraction_is_never_no_layer_at_all(budget, remedy):
    with pytest.raises(ConfigError, match=remedy):
        MasformerConfig.parse({"budget": budget}, "test")


def test_more_than_there_are():
    with pytest.raises(ConfigError, match="budget: 31 is 31 layers of 30"):
        MasformerConfig(budget="31").count(30)
