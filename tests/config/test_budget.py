import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.config.budget import Budget, parse_budget
from tenfold.config.gear import CacheConfig
from tenfold.config.lora import LoraConfig
from tenfold.config.losparse import LoSparseConfig
from tenfold.config.masformer import MasformerConfig
from tenfold.config.r3m import R3MConfig
from tenfold.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("0.4%", 0.004, "share"),
        ("100%", 1.0, "share"),
        ("300k", 300_000, "count"),
        ("1.5M", 1_500_000, "count"),
        ("12", 12, "count"),
        ("64MiB", 64 * 2**20, "bytes"),
        ("64MB", 64e6, "bytes"),
        ("200ms", 0.2, "seconds"),
        ("4.5bits", 4.5, "bits"),
        ("9KiB/token", 9 * 2**10, "bytes/token"),
    ],
)
def test_every_form_of_the_plan(text, amount, unit):
    budget = parse_budget(text)
    assert budget.unit == unit
    assert budget.amount == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize("text", ["", "%", "101%", "-3", "3 apples", "1e", "4MiB/s", "nan", "inf"])
def test_what_is_no_budget_is_refused_with_the_forms_that_exist(text):
    with pytest.raises(ValueError, match=r"50%"):
        parse_budget(text)


@given(st.integers(min_value=0, max_value=10**12))
def test_a_plain_count_is_exact(count):
    assert parse_budget(str(count)) == Budget(float(count), "count")


@pytest.mark.parametrize(
    ("config", "key", "text", "says", "not_says"),
    [
        (LoSparseConfig, "budget", "150%", "write 50% .at most 100%., 300k or 64MiB", "200ms"),
        (LoSparseConfig, "budget", "250KB", r"write 250KiB .1 KiB is 1,024 bytes. or 250kB", "300k"),
        (LoSparseConfig, "budget", "200ms", "'200ms' is a time", "4.5bits"),
        (LoraConfig, "budget", "9KiB/token", "is bytes for each token", "4.5bits"),
        (MasformerConfig, "budget", "64MiB", "is a number of bytes, .* write 50% .at most 100%. or 300k", "9KiB/token"),
        (CacheConfig, "budget", "50%", "write 4.5bits or 9KiB/token", "300k"),
        (R3MConfig, "budget", "5", "write 50%", "300k"),
    ],
)
def test_a_refusal_offers_what_is_valid_there(config, key, text, says, not_says):
    with pytest.raises(ConfigError, match=says) as refused:
        config.parse({key: text}, "test")
    assert not_says not in str(refused.value)
