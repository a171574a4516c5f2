"""Second copies and needles: what is scored, and that a model which copies, and one which forgets, are told apart."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tenfold.errors import DataError
from tenfold.evaluate.long_context import copying, hidden, needle, repeated, spread
from tenfold.models.inference import text_loss
from tenfold.models.tiny import tiny_model
from tests.tokenizers import metaspace


class Copier(nn.Module):
    """Says what followed the last time that the four tokens before now stood in the text, if that is near enough."""

    def __init__(self, window):
        super().__init__()
        self.embedding, self.window = nn.Embedding(256, 1), window

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=False):
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 256)
        for now in range(3, len(ids)):
            for earlier in range(now - 1, max(3, now - self.window), -1):
                if ids[earlier - 3 : earlier + 1] == ids[now - 3 : now + 1]:
                    logits[0, now, ids[earlier + 1]] = 20.0
                    break
        return SimpleNamespace(logits=logits)


PIECES = list(torch.randint(97, 122, (3, 160), generator=torch.Generator().manual_seed(0)))


class Letters:
    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": list(text.encode())}


def figures(result):
    return {metric.name: metric.value for metric in result.metrics}


def test_who_copies_from_afar_and_who_forgets():
    near, far = Copier(120), Copier(10**6)
    assert figures(copying(far, PIECES, 32))["repeat_nll"] < 1.0
    assert figures(copying(near, PIECES, 32))["repeat_nll"] > 5.0
    assert figures(copying(far, PIECES, 32))["text_nll"] > 5.0
    found = [figures(needle(model, Letters(), PIECES)) for model in (far, near)]
    assert found[0]["found"] == 1
    assert found[0]["needle_nll"] < 0.01
    assert 0 < found[1]["found"] < 1, "only the deepest needle is near enough"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_are_those_of_separate_passes(kind):
    model = tiny_model(kind).model.eval()
    pieces = [piece[:50] for piece in PIECES]
    found = figures(copying(model, pieces, 20))
    plain = copies = 0.0
    with torch.no_grad():
        for ids in pieces:
            plain += float(cross_entropy(model(input_ids=ids[None]).logits[0, 24:-1], ids[25:])) / 3
            both = torch.cat([ids, ids[:20]])
            # The first token of a second copy cannot be known.
            copies += float(cross_entropy(model(input_ids=both[None]).logits[0, 50:-1], both[51:])) / 3
            whole, scored = repeated(ids, 20, 30)[0]
            assert torch.equal(whole, both)
            expected = cross_entropy(model(input_ids=both[None]).logits[0, 50:-1], both[51:])
            torch.testing.assert_close(text_loss(model, whole, scored), expected)
    assert found["text_nll"] == pytest.approx(plain, rel=1e-5)
    assert found["repeat_nll"] == pytest.approx(copies, rel=1e-5)


def test_a_needle_lies_where_it_was_put_and_only_its_number_is_scored():
    tokenizer = tiny_model("llama").tokenizer
    ids = torch.tensor(tokenizer("abcdefgh" * 4, add_special_tokens=False)["input_ids"])
    whole, scored, *_ = hidden(tokenizer, ids, 0.5, 40712)
    text = tokenizer.decode(whole)
    assert text.startswith("abcdefgh" * 2 + "\n\n")
    assert text.count("lighthouse is 40712") == 2
    assert text.endswith("lighthouse is 40712")
    assert tokenizer.decode(whole[scored]) == " 40712"


@pytest.mark.parametrize("prefix", ["prepend", "always", "first"])
def test_a_needle_has_no_mark_of_a_beginning_within_the_text(prefix):
    tokenizer = metaspace(prefix)
    whole, scored, *_ = hidden(tokenizer, torch.tensor(tokenizer("the answer")["input_ids"]), 1.0, 40712)
    assert "".join(tokenizer.convert_ids_to_tokens(whole[scored])) in ("▁40712", "is▁40712")  # where the space merges
    told = "\n\nRemember▁this:▁the▁secret▁number▁of▁the▁lighthouse▁is▁40712"
    assert "".join(tokenizer.convert_ids_to_tokens(whole)) == f"<s>▁the▁answer{told}.\n\n{told}"


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="numbers: 9 tokens, and 5 pieces of 2"):
        spread(torch.arange(9), 2, 5, "numbers")
