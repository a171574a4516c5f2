"""Methods that share a tensor or a hook mean together what each promises: compared with one dense softmax in float64.

Each case names what is on. The text, the scores and every step of greedy decoding must be those of the definition, and
without any one of the methods they must be others.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tenfold.attend import masformer
from tenfold.attend.autopasta.answering import AutoPasta
from tenfold.engines.requests import Evidence, Request
from tenfold.engines.session import Session
from tenfold.errors import ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

from .dense import Meaning, log_probabilities

PROMPTS = (
    "It was red, she said, and nobody believed that the old mill by the river had ever been painted in that colour.",
    "The red door stayed shut all day, whatever the people of the village said about it.",
)
PARTS = ("colour", "village")
TAILS = (" It was red indeed.", " Blue")
HEADS, ALPHA, WINDOW = {0: [1], 1: [0, 2], 2: [3]}, 0.01, 40
# Blocks of 16 bits are bfloat16: codes of fewer bits would hide a small mistake, exact ones would never be packed.
PACKED = "plain:16,buffer=16,kernel=torch"
LOUD = {"initializer_range": 0.08}  # attention of the usual random weights is next to nothing
KINDS = {
    "llama": LOUD,
    "qwen2": LOUD,
    "gemma3": {**LOUD, "layer_types": ["full_attention"] * 3, "sliding_window": 4096},
}
PAIRS = [
    {"pasta", "gear"},
    {"pasta", "masformer"},
    {"gear", "masformer"},
    {"adapter", "pasta"},
    {"adapter", "gear"},
    {"adapter", "masformer"},
    {"adapter", "pasta", "gear", "masformer"},
]


def build(kind, on):
    """A model with what changes it, and the plain model whose dense softmax is compared with."""
    opened = tiny_model(kind, num_hidden_layers=3, **KINDS[kind])
    plain = tiny_model(kind, num_hidden_layers=3, **KINDS[kind]).model
    model = opened.model
    if "masformer" in on:
        masformer.convert(model, full_layers=[1], span=AttentionWindow("sliding", WINDOW))
    if "adapter" in on:
        config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, lora_alpha=16, init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, config)
            torch.manual_seed(1)
            plain = get_peft_model(plain, config).merge_and_unload()
    return model, opened.tokenizer, plain


def meaning(on, prompt, marked):
    steered = "pasta" in on or "autopasta" in on
    return Meaning(
        len(prompt),
        marked if steered else [],
        HEADS,
        ALPHA,
        {0: WINDOW, 2: WINDOW} if "masformer" in on else {},
    )


def session(model, tokenizer, on):
    return Session(model, tokenizer, kv=PACKED if "gear" in on else None, heads=HEADS, alpha=ALPHA)


def expected(tokenizer, plain, on, prompt, marked, tails):
    """The log-probability of each tail; one token is one byte here."""
    values = []
    for tail in tails:
        ids = tokenizer(prompt + tail)["input_ids"]
        logs = log_probabilities(plain, ids, meaning(on, prompt, marked))
        values.append(float(sum(logs[at - 1, ids[at]] for at in range(len(prompt), len(ids)))))
    return torch.tensor(values)


def places(text, part):
    start = text.index(part)
    return list(range(start, start + len(part)))


@pytest.mark.parametrize("on", PAIRS, ids=lambda on: " x ".join(sorted(on)))
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_texts_are_those_of_the_definition(kind, on):
    model, tokenizer, plain = build(kind, on)
    engine = session(model, tokenizer, on)
    # Of two lengths, so that one is padded.
    parts = [(part,) if "pasta" in on else () for part in PARTS]
    pairs = zip(PROMPTS, parts, strict=True)
    requests = [Request(prompt, emphasis=emphasis, max_new_tokens=10) for prompt, emphasis in pairs]
    scores, texts = engine.score(requests, TAILS), engine.generate(requests)
    close = 2e-2 if "gear" in on else 1e-4
    for prompt, part, score, text in zip(PROMPTS, PARTS, scores, texts, strict=True):
        marked = places(prompt, part)
        found = torch.tensor([score.log_probabilities[tail] for tail in TAILS])
        right = expected(tokenizer, plain, on, prompt, marked, TAILS)
        torch.testing.assert_close(found, right, atol=close, rtol=0)
        ids = [*tokenizer(prompt)["input_ids"], *text.token_ids]
        logs = log_probabilities(plain, ids, meaning(on, prompt, marked))[len(prompt) - 1 :]
        chosen = logs.gather(1, torch.tensor(text.token_ids)[:, None])[:, 0]
        assert float((logs.max(1).values - chosen).max()) < close
        assert text.tokens == 10 or text.finish == "stop"
    for one in on - {"gear"}:  # the scores are no accident: without the method they are others
        other = build(kind, set())[2] if one == "adapter" else plain
        without = expected(tokenizer, other, on - {one}, prompt, marked, TAILS)
        assert float((without - right).abs().max()) > 5 * close, one
    if "gear" in on:
        assert engine.notes[0].startswith(PACKED)


@pytest.mark.parametrize("on", [{"autopasta", "gear"}, {"autopasta", "masformer"}, {"autopasta", "gear", "masformer"}])
@pytest.mark.parametrize("kind", KINDS)
def test_evidence_is_emphasis_of_the_sentence_that_was_found(kind, on, monkeypatch):
    context = "The mill is old. The red door leads to the hut. It rains."
    sentence = "The red door leads to the hut."
    monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows: ([sentence] * len(rows), None))
    model, tokenizer, plain = build(kind, on)
    prompts = {"answer_prompt": "{context} Q: {question} A:", "identify_prompt": "{context} {question}"}
    settings = {"heads": HEADS, "alpha": ALPHA, "chat": False, "evidence": prompts}
    scorer, writer = (Session(model, tokenizer, kv=PACKED if "gear" in on else None, **settings) for _ in range(2))
    request = Request(evidence=Evidence("Where?", context), max_new_tokens=12)
    prompt = f"{context} Q: Where? A:"
    marked = places(prompt, sentence)
    score, reply = scorer.score([request], TAILS)[0], writer.generate([request])[0]
    assert all(engine.notes[0].startswith(PACKED) for engine in (scorer, writer) if "gear" in on)
    assert score.found.spans == reply.found.spans == ((17, 47),)
    found = torch.tensor([score.log_probabilities[tail] for tail in TAILS])
    close = 2e-2 if "gear" in on else 1e-4
    right = expected(tokenizer, plain, on, prompt, marked, TAILS)
    torch.testing.assert_close(found, right, atol=close, rtol=0)
    for one in on - {"gear"}:
        without = expected(tokenizer, plain, on - {one}, prompt, marked, TAILS)
        assert float((without - right).abs().max()) > 5 * close, one
    ids = [*tokenizer(prompt)["input_ids"], *reply.token_ids]
    logs = log_probabilities(plain, ids, meaning(on, prompt, marked))[len(prompt) - 1 :]
    chosen = logs.gather(1, torch.tensor(reply.token_ids)[:, None])[:, 0]
    assert float((logs.max(1).values - chosen).max()) < close


def test_few_bits_move_the_scores_that_sixteen_leave():
    """The comparison above would see a cache that is not read: two bits are told from sixteen."""
    model, tokenizer, plain = build("llama", set())
    right = expected(tokenizer, plain, set(), PROMPTS[0], [], TAILS)
    off = []
    for kv in (PACKED, "plain:2,buffer=16,kernel=torch"):
        engine = Session(model, tokenizer, kv=kv)
        score = engine.score([Request(PROMPTS[0])], TAILS)[0]
        off.append(float((torch.tensor([score.log_probabilities[tail] for tail in TAILS]) - right).abs().max()))
    assert off[0] < 2e-2 < off[1]


def test_windows_of_gemma_keep_their_emphasis_and_what_is_packed_beside_them():
    """Gemma's own mixture: a sliding layer, whose cache stays exact, under a full one, which is packed."""
    opened = tiny_model("gemma3")
    heads = {0: [1], 1: [0, 2]}
    engine = Session(opened, kv=PACKED, heads=heads, alpha=ALPHA)
    prompt = PROMPTS[0]
    marked = places(prompt, "colour")
    score = engine.score([Request(prompt, emphasis=("colour",))], TAILS)[0]
    for tail, value in score.log_probabilities.items():
        ids = opened.tokenizer(prompt + tail)["input_ids"]
        logs = log_probabilities(opened.model, ids, Meaning(len(prompt), marked, heads, ALPHA))
        right = float(sum(logs[at - 1, ids[at]] for at in range(len(prompt), len(ids))))
        assert value == pytest.approx(right, abs=2e-2)


def test_spans_on_top_of_windows_are_refused():
    opened = tiny_model("gemma3")
    with pytest.raises(ModelError, match="spans of their own"):
        masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 16))
