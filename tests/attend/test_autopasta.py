"""What a user of AutoPASTA meets besides the oracles: modes, fallbacks, windows, prompts and refusals."""

import math
import re
from pathlib import Path

import pytest
import torch

from tenfold.attend.autopasta.answering import MODES, Answer, AutoPasta
from tenfold.attend.autopasta.prompts import QuestionPrompt
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.heads import rank
from tenfold.attend.pasta.likelihood import continuation, likelihood
from tenfold.attend.pasta.profiles import Profile, all_heads, by_layer, load_profile
from tenfold.attend.pasta.search import coarse_to_fine
from tenfold.attend.text_marks import Marked, encode
from tenfold.errors import ConfigError, ModelError, TenfoldError
from tenfold.models.tiny import tiny_model
from tests.tokenizers import metaspace

CONTEXT = "The dog is out. Ann has a cat. The cat is in the hut. It rains."
QUESTION = "Where is the cat?"
HUT = (31, 53)


@pytest.fixture(scope="module")
def opened():
    return tiny_model("llama")


def asking(opened, **settings):
    settings = {"heads": {0: [1], 1: [0, 2]}, "max_quote_tokens": 4, "max_answer_tokens": 5} | settings
    return AutoPasta(opened.model, opened.tokenizer, **settings)


@pytest.fixture
def quote(monkeypatch):
    """Sets what the model says is the sentence."""
    identify = AutoPasta._identify

    def say(text):
        monkeypatch.setattr(AutoPasta, "_identify", lambda self, rows: ([text] * len(rows), identify(self, rows)[1]))

    return say


def test_modes(opened, quote):
    quote("<think>Which one?</think>The sentence is: “the cat is in the hut.”")
    ask = asking(opened)
    found = {mode: ask(QUESTION, CONTEXT, mode=mode, gold=[(0, 15)]) for mode in MODES}
    spans = {mode: answer.spans for mode, answer in found.items()}
    assert spans == {
        "direct": (),
        "iterative": (),
        "autopasta": (HUT,),
        "gold": ((0, 15),),
        "whole": ((0, len(CONTEXT)),),
    }
    assert (found["autopasta"].score, found["autopasta"].stage) == (1.0, "normalised")
    assert not any(answer.fallback for answer in found.values())
    assert [answer.quote is None for answer in found.values()] == [True, False, False, True, True]
    assert set(found["autopasta"].timings) == {"identify", "locate", "answer"}
    assert set(found["direct"].timings) == {"answer"}


def test_a_random_model_answers(opened):
    answer = asking(opened)(QUESTION, CONTEXT)
    assert isinstance(answer.quote, str)
    assert answer.reused > 0


@pytest.mark.parametrize("said", ["", "I do not know.", "<think>The cat", "Quantum chromodynamics explains hadrons."])
def test_nothing_found(opened, quote, said):
    quote(said)
    ask = asking(opened)
    answer, direct = ask(QUESTION, CONTEXT), ask(QUESTION, CONTEXT, mode="direct")
    assert (answer.answer, answer.fallback, answer.spans, answer.score) == (direct.answer, True, (), None)


def test_refusal_is_not_pasted(opened, quote):
    quote("None.")
    answer = asking(opened)(QUESTION, CONTEXT, mode="iterative")
    assert answer.fallback
    assert answer.answer == asking(opened)(QUESTION, CONTEXT, mode="direct").answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", ["", " \n "])
def test_no_context(opened, mode, context):
    answer = asking(opened)(QUESTION, context, mode=mode, gold=[])
    assert answer.spans == ()
    assert answer.fallback is (mode in ("autopasta", "gold", "whole")) or mode == "iterative"


def test_context_with_outer_space(opened):
    context = f"\n  {CONTEXT} \n"
    assert asking(opened, chat=True)(QUESTION, context, mode="whole").spans == ((3, 3 + len(CONTEXT)),)


def test_several_sentences(opened, quote):
    quote("It rains. The dog is out.")
    assert asking(opened)(QUESTION, CONTEXT).spans == ((0, 15),)
    answer = asking(opened, max_spans=2)(QUESTION, CONTEXT)
    assert answer.spans == ((0, 15), (54, 63))
    assert answer.score == 1.0
    # Only the two are marked, not what stands between.
    marks = encode(opened.tokenizer, [asking(opened).answering(QUESTION, CONTEXT, answer.spans)])
    assert int(marks.marked.sum()) == 15 + 9


def test_own_splitter_and_embedder(opened, quote):
    quote("Felines")
    ask = asking(
        opened,
        split=lambda context: [(0, 30), (31, 63)],
        embed=lambda texts: [[1.0, 0.0] if "hut" in text or "Felines" in text else [0.0, 1.0] for text in texts],
    )
    assert ask(QUESTION, CONTEXT).fallback  # one word could mean anything
    quote("Felines live there now")
    ask.embed = lambda texts: [[1.0, 0.0] if "hut" in text or "live" in text else [0.0, 1.0] for text in texts]
    answer = ask(QUESTION, CONTEXT)
    assert (answer.spans, answer.stage) == (((31, 63),), "embedding")


def test_windows_that_left_the_mark_behind():
    opened = tiny_model("gemma3")  # layer 0 looks back 32 tokens, layer 1 is full
    both, full, window = ({0: [1], 1: [0]}, {1: [0]}, {0: [1]})
    scores = [
        asking(opened, heads=heads).log_probabilities([QUESTION], [CONTEXT], ["hut"], mode="gold", gold=[[HUT]]).total
        for heads in (both, full)
    ]
    assert torch.equal(*scores)
    answer = asking(opened, heads=window)(QUESTION, CONTEXT, mode="gold", gold=[HUT])
    assert (answer.fallback, answer.spans) == (True, ())
    # A mark within reach is steered in both, also in one batch with one that is not.
    short = asking(opened, heads=both, answer_prompt="{question} {context}", chat=False)
    rows = ([QUESTION] * 2, [CONTEXT] * 2, ["hut"] * 2)
    near, far = [(54, 63)], [(0, 15)]
    together = short.log_probabilities(*rows, mode="gold", gold=[near, far]).total
    for row, gold in enumerate((near, far)):
        alone = short.log_probabilities(*([part[0]] for part in rows), mode="gold", gold=[gold]).total
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)
    assert asking(opened)(QUESTION, CONTEXT).reused == 0  # its cache forgets


def test_likelihood_is_that_of_generation(opened):
    ask = asking(opened)
    marks = encode(opened.tokenizer, [ask.answering(QUESTION, CONTEXT, [HUT]), ask.answering("Who?", CONTEXT)])
    with steer(opened.model, marks, heads=ask.heads):
        output = opened.model.generate(
            **marks.inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tails = output.sequences[:, marks.input_ids.shape[1] :]
        found = likelihood(opened.model, marks, tails.tolist())
    steps = torch.stack(output.logits, 1).log_softmax(-1).gather(2, tails[..., None])[..., 0]
    torch.testing.assert_close(found.total, steps.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.first, steps[:, 0], atol=1e-5, rtol=1e-5)


def test_continuation_that_merges():
    class Pairs:
        """A tokenizer of pairs of characters: an odd prompt ends in a token that a continuation would join."""

        def __call__(self, text, **_):
            return {"input_ids": [text[at : at + 2] for at in range(0, len(text), 2)]}

    assert continuation(Pairs(), Marked("abcd"), "ef") == ["ef"]
    assert continuation(Pairs(), Marked("abc"), "def") == ["de", "f"]
    with pytest.raises(ConfigError, match="no token"):
        continuation(Pairs(), Marked("ab"), "")


def test_continuation_that_merges_has_no_mark_of_a_beginning():
    tokenizer = metaspace("prepend")
    shown = [
        tokenizer.convert_ids_to_tokens(continuation(tokenizer, Marked(prompt), "c")) for prompt in ("yes", "a+b=")
    ]
    assert shown == [["c"], ["c"]]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a+b=c")["input_ids"])[-1] == "a+b=c"  # the case that is meant


def test_template_arguments(opened, monkeypatch):
    template = "{{ flag }}" + opened.tokenizer.chat_template
    monkeypatch.setattr(opened.tokenizer, "chat_template", template)
    prompt = asking(opened, template={"flag": "Hm: "}).answering(QUESTION, CONTEXT, [HUT])
    assert prompt.text.startswith("Hm: <|im_start|>user")
    assert prompt.text[prompt.spans[0].start : prompt.spans[0].end] == CONTEXT[slice(*HUT)]


def test_heads(opened):
    every = by_layer(all_heads(opened.model))
    assert asking(opened, heads="all").heads == every
    assert asking(opened, heads=None, profile=Profile({1: (3,)})).heads == {1: (3,)}
    none = asking(opened, heads={})(QUESTION, CONTEXT, mode="gold", gold=[HUT])
    assert none.answer == asking(opened)(QUESTION, CONTEXT, mode="direct").answer


def test_braces_in_texts(opened):
    prompt = QuestionPrompt("p", "{{x}} {context} {question}").marked("{context}?", "{question} {0}", [(0, 10)])
    assert prompt.text == "{x} {question} {0} {context}?"
    assert (prompt.spans[0].start, prompt.spans[0].end) == (4, 14)
    asked = asking(opened, chat=False).answering("{quote}?", "{question}", quote="{context}")
    assert "Question: {quote}?\nKey sentence of the text: {context}\n" in asked.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"identify_prompt": "{context}"}, r"identify_prompt: its fields are \['context'\]"),
        ({"answer_prompt": "{context} {question} {question}"}, "answer_prompt: its fields"),
        ({"answer_prompt": "{context} {question} {other}"}, "other"),
        ({"answer_prompt": "{context!r} {question}"}, "answer_prompt"),
        ({"answer_prompt": "{context} {question"}, "answer_prompt"),
        ({"alpha": -1}, "alpha: -1"),
        ({"heads": {7: [0]}}, "layer 7"),
        ({"heads": {0: [9]}}, "head 9"),
        ({"heads": None, "profile": "no-such-one"}, "no-such-one"),
        ({"max_spans": 0}, "max_spans: 0"),
        ({"min_similarity": 2}, r"min_similarity: must be in \[-1, 1\], got 2"),
        ({"max_answer_tokens": 0}, "max_answer_tokens"),
    ],
)
def test_refused_settings(opened, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        asking(opened, **settings)
    assert caught.value.remedy


def test_refused_without_template(opened, monkeypatch):
    monkeypatch.setattr(opened.tokenizer, "chat_template", None)
    assert asking(opened).answering("a", "b").special
    with pytest.raises(ModelError, match="chat template"):
        asking(opened, chat=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"question": " "}, "question 1 is blank"),
        ({"mode": "best"}, "'best'"),
        ({"mode": "gold"}, "gold: missing"),
        ({"mode": "gold", "gold": [(0, 99)]}, r"\(0, 99\) of question 1 .* 63 characters"),
        ({"mode": "gold", "gold": [(5, 5)]}, r"\(5, 5\)"),
        ({"context": CONTEXT * 8}, r"a prompt of \d+ tokens and 4 to write .* 512 positions"),
        ({"context": CONTEXT * 8, "mode": "direct"}, r"a prompt of \d+ tokens and 5 to write .* 512 positions"),
    ],
)
def test_refused_calls(opened, arguments, words):
    with pytest.raises(ConfigError, match=words) as caught:
        asking(opened)(**({"question": QUESTION, "context": CONTEXT} | arguments))
    assert caught.value.remedy


def test_refused_batches(opened):
    ask = asking(opened)
    with pytest.raises(ConfigError, match="2 questions, 1 contexts"):
        ask.batch(["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="batch_size: 0"):
        ask.batch(["a"], ["c"], batch_size=0)
    with pytest.raises(ConfigError, match="1 questions, 2 continuations"):
        ask.log_probabilities(["a"], ["c"], ["d", "e"])
    with pytest.raises(TenfoldError, match="no token"):
        ask.log_probabilities(["a"], ["c"], [""], mode="direct")
    assert ask.batch([], []) == []
    assert ask.log_probabilities([], [], []).total.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"counts": {}}, "counts"),
        ({"counts": {0: 0}}, "counts"),
        ({"keep": 0}, "keep: 0 of 2"),
        ({"keep": 3}, "keep: 3 of 2"),
        ({"per_layer": (), "pooled": ()}, "per_layer, pooled"),
        ({"pooled": (0,)}, "per_layer, pooled"),
        ({"score": lambda heads: math.nan}, "score: not a number for any of 1 candidates, 2 heads of layer 0"),
    ],
)
def test_refused_searches(arguments, words):
    with pytest.raises(ConfigError, match=words):
        coarse_to_fine(**({"score": len, "counts": {0: 2, 1: 2}, "keep": 1} | arguments))


def test_the_head_whose_score_raises_is_named_and_the_search_goes_on_from_there():
    def score(heads):
        if heads == ((1, 2),) and broken:
            raise ZeroDivisionError("no items")
        return float(sum(head for _, head in heads))

    known, broken = {}, True
    with pytest.raises(ConfigError, match="score of layer 1 head 2: ZeroDivisionError: no items"):
        coarse_to_fine(score, {0: 1, 1: 3}, 1, per_layer=[1], pooled=[2], known=known)
    assert set(known) == {((0, 0),), ((1, 0), (1, 1), (1, 2)), ((1, 0),), ((1, 1),)}
    broken = False
    found = coarse_to_fine(score, {0: 1, 1: 3}, 1, per_layer=[1], pooled=[2], known=known)
    assert found.ranking == ((1, 2), (1, 1), (1, 0))
    with pytest.raises(ConfigError, match="score of 2 heads of layer 0: TypeError"):
        coarse_to_fine(lambda heads: None, {0: 2}, 1)


def test_what_is_not_a_number_ranks_last():
    """Of layers, of heads and of candidates; infinities keep their place."""
    scores = {
        ((0, 0),): math.nan,
        ((1, 0), (1, 1), (1, 2)): 1.0,
        ((2, 0), (2, 1)): -math.inf,
        ((1, 0),): math.nan,
        ((1, 1),): -math.inf,
        ((1, 2),): 0.5,
        ((2, 0),): math.nan,
        ((2, 1),): 2.0,
    }
    found = coarse_to_fine(lambda heads: scores.get(heads, math.nan), {0: 1, 1: 3, 2: 2}, 2, per_layer=[1], pooled=[1])
    assert found.layers == (1, 2)
    assert found.ranking == ((2, 1), (1, 2), (1, 1), (1, 0), (2, 0))
    assert found.heads == ((2, 1),)  # the candidate of both layers is not a number
    assert rank({(0, 0): math.nan, (0, 1): -1.0, (1, 0): 2.0, (1, 1): math.nan}) == [(1, 0), (0, 1), (0, 0), (1, 1)]


def test_search_prefers_fewer_heads():
    found = coarse_to_fine(lambda heads: min(len(heads), 2), {0: 3, 4: 1}, 1, per_layer=[3, 2], pooled=[3])
    assert found.heads == ((0, 0), (0, 1))
    assert found.candidates == {((0, 0), (0, 1)): 2, ((0, 0), (0, 1), (0, 2)): 2}


def test_the_search_that_the_page_shows_runs(tmp_path, monkeypatch):
    """What docs/steering.md tells people to type, on a tiny model: two layers of four heads."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/steering.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "coarse_to_fine" in code]
    names: dict = {}
    exec(block.replace('"demo"', '"tiny:llama"').replace("32", "4").replace("keep=4", "keep=1"), names)
    assert len(names["found"].coarse) + len(names["found"].fine) == 2 + 4
    assert load_profile("heads.json").size == len(names["found"].heads) > 0


def test_answers_compare_without_times():
    assert Answer("a", timings={"answer": 1.0}) == Answer("a", timings={"answer": 2.0})
