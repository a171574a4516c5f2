"""What every method does that is put on a model in Python: it comes off again without a trace, in any order."""

from contextlib import contextmanager, suppress

import pytest
import torch

from tenfold.errors import TenfoldError
from tenfold.models.tiny import tiny_model

from .conftest import hooks
from .rows import params, reading

ATTACHED = params(lambda row: row.attachment)
KINDS = [
    pytest.param(row, kind, id=f"{row.name}-{kind}")
    for row in (param.values[0] for param in ATTACHED)
    for kind in row.attachment.models
]


@contextmanager
def as_it_was(opened):
    """Whatever happens within, the model is the same afterwards, to the bit."""
    model = opened.model
    before, implementation = reading(opened), model.config._attn_implementation
    names = [name for name, _ in model.named_parameters()]
    yield before
    assert torch.equal(reading(opened), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.config._attn_implementation == implementation
    assert not hooks(model)


@pytest.mark.parametrize(("row", "kind"), KINDS)
def test_it_says_what_it_touched_and_leaves_no_trace(row, kind):
    opened = tiny_model(kind, **({"sliding_window": 256} if kind == "gemma3" else {}))
    with as_it_was(opened) as before:
        with suppress(KeyboardInterrupt), row.attachment.on(opened, {}) as attached:
            found = attached.read()
            assert row.attachment.touched(attached.report())
            raise KeyboardInterrupt
        if row.attachment.change is None:
            assert torch.equal(found, before)
        else:
            least, most = row.attachment.change
            difference = (found - before).abs().max()
            assert least < difference <= most


@pytest.mark.parametrize("row", ATTACHED)
def test_what_cannot_be_is_refused_also_beside_what_can_be(row):
    for keys, said in row.attachment.refused:
        opened = tiny_model("llama")
        with as_it_was(opened), pytest.raises(TenfoldError, match=said):
            row.attachment.on(opened, keys).__enter__()


@pytest.mark.filterwarnings("ignore:.*see no mark from the end of the prompt")  # what is far is out of a short span
@pytest.mark.parametrize("first_out", ["inner", "outer"])
@pytest.mark.parametrize("inner", ATTACHED)
@pytest.mark.parametrize("outer", ATTACHED)
def test_two_methods_come_off_in_any_order(outer, inner, first_out):
    opened = tiny_model("llama")
    with as_it_was(opened):
        contexts = {"outer": outer.attachment.on(opened, {}), "inner": inner.attachment.on(opened, {})}
        contexts["outer"].__enter__()
        try:
            contexts["inner"].__enter__().read()
        except TenfoldError:  # they exclude each other, and say so
            del contexts["inner"]
        contexts.pop(first_out, next(iter(contexts.values()))).__exit__(None, None, None)
        for context in contexts.values():
            context.__exit__(None, None, None)
