"""lm-evaluation-harness through a session: its scores and texts, against plain transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'tenfold[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import MambaConfig, MambaForCausalLM

from tenfold.attend import masformer
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError
from tenfold.evaluate.harness import SessionLM
from tenfold.kernels.local import AttentionWindow
from tenfold.models.opened import Opened
from tenfold.models.tiny import tiny_model, tiny_tokenizer

CONTEXTS = ("The sky is", "It was red, she said, and nobody believed it. So the mill was", "")
TAILS = (" blue", " a fish of some length", " b")
PACKED = "plain:{},buffer=16,kernel=torch"


def asked(kind, *arguments):
    """Requests as tasks make them."""
    return [Instance(kind, {}, given, 0) for given in arguments]


def recurrent():
    """A model whose past is a state, in place of keys and values."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=8, num_hidden_layers=2)
        return Opened(MambaForCausalLM(config).eval(), tokenizer, {})


def plain_scores(opened, context, tail):
    """One pass of transformers over context and continuation; a token is a byte."""
    ids = opened.tokenizer(context)["input_ids"] or [opened.tokenizer.bos_token_id]
    whole = ids + opened.tokenizer(tail)["input_ids"]
    with torch.no_grad():
        logs = opened.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(ids), len(whole))
    greedy = all(int(logs[at - 1].argmax()) == whole[at] for at in places)
    return float(sum(logs[at - 1, whole[at]] for at in places)), greedy


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_one_plain_pass(kind, batch_size):
    opened = recurrent() if kind == "mamba" else tiny_model(kind)
    opened.model.double()
    pairs = [(context, tail) for context in CONTEXTS for tail in TAILS]
    lm = SessionLM(Session(opened, batch_size=batch_size))
    for pair, (score, greedy) in zip(pairs, lm.loglikelihood(asked("loglikelihood", *pairs)), strict=True):
        right, best = plain_scores(opened, *pair)
        assert score == pytest.approx(right, abs=1e-4), pair
        assert greedy == best, pair
    written = lm.session.generate([Request(CONTEXTS[0], max_new_tokens=3)])[0].token_ids
    ids = opened.tokenizer(CONTEXTS[0])["input_ids"]
    tails = [list(written), [*written[:2], written[2] + 1]]
    found = lm._loglikelihood_tokens([(("", ""), ids, tail) for tail in tails])
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_likelihoods_and_long_contexts_are_those_of_the_harness():
    """What does not fit is cut where the harness cuts it."""
    opened = tiny_model("llama", max_position_embeddings=64)
    opened.model.double()
    ours, theirs = SessionLM(Session(opened)), HFLM(pretrained=opened.model, tokenizer=opened.tokenizer)
    text = "It was red, she said, and nobody believed that the mill had been painted. " * 3
    for kind, given in (("loglikelihood_rolling", [(text,), ("Short.",)]), ("loglikelihood", [(text, TAILS[1])])):
        found, right = (getattr(lm, kind)(asked(kind, *given)) for lm in (ours, theirs))
        assert torch.tensor(found, dtype=torch.float64).flatten().tolist() == pytest.approx(
            torch.tensor(right, dtype=torch.float64).flatten().tolist(), abs=1e-5
        )


def test_texts_are_those_of_the_harness():
    opened = tiny_model("llama", max_position_embeddings=64)
    opened.model.double()
    ours, theirs = SessionLM(Session(opened)), HFLM(pretrained=opened.model, tokenizer=opened.tokenizer)
    whole = theirs.generate_until(asked("generate_until", (CONTEXTS[0], {"until": [], "max_gen_toks": 12})))[0]
    ways = [
        {"until": [], "max_gen_toks": 12},
        {"until": [whole[4:6]], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        {"until": whole[2], "max_gen_toks": 5, "top_p": 1.0},
    ]
    for how in ways:
        given = [(context, dict(how)) for context in (CONTEXTS[0], CONTEXTS[1], CONTEXTS[1] * 2)]
        found, right = (lm.generate_until(asked("generate_until", *given)) for lm in (ours, theirs))
        assert found == right, how


def test_a_packed_cache_an_adapter_and_spans_reach_it():
    from peft import LoraConfig, get_peft_model

    opened = tiny_model("llama", num_hidden_layers=3, initializer_range=0.08)
    pairs = [(CONTEXTS[1] * 2, tail) for tail in TAILS[:2]]

    def scores(model, kv=None):
        session = Session(model, opened.tokenizer, kv=kv)
        found = [score for score, _ in SessionLM(session).loglikelihood(asked("loglikelihood", *pairs))]
        rolled = SessionLM(session).loglikelihood_rolling(asked("loglikelihood_rolling", (CONTEXTS[1] * 2,)))
        assert bool(session.notes) == (kv is not None)
        return torch.tensor([*found, *rolled])

    plain = scores(opened.model)
    fine, coarse = (scores(opened.model, PACKED.format(bits)) for bits in (16, 2))
    assert float((fine - plain).abs().max()) < 0.1 < float((coarse - plain).abs().min())
    handle = masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 8))
    local = scores(opened.model)
    assert float((local - plain).abs().min()) > 0.01
    assert float((scores(opened.model, PACKED.format(16)) - local).abs().max()) < 0.1
    handle.revert()
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(opened.model, config)
    assert float((scores(adapted) - plain).abs().min()) > 0.01


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 4}, "num_beams: 4"),
        ({"do_sample": True, "top_p": 0.9}, "top_p: 0.9"),
        ({"max_gen_toks": 64}, "has 64 tokens written, and the model reads 64"),
    ],
)
def test_what_sessions_lack_is_refused_by_name(how, message):
    lm = SessionLM(Session(tiny_model("llama", max_position_embeddings=64)))
    with pytest.raises(ConfigError, match=message):
        lm.generate_until(asked("generate_until", (CONTEXTS[0], {"until": ["."], **how})))
