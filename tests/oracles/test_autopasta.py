"""The oracles of section 7 of the specification, by number."""

import math
from collections import Counter
from random import Random

import pytest
import torch

from tenfold.attend.autopasta.answering import AutoPasta
from tenfold.attend.autopasta.quote_matching import bag_of_words, locate_quote
from tenfold.attend.autopasta.sentences import sentences
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.likelihood import likelihood
from tenfold.attend.pasta.search import coarse_to_fine
from tenfold.attend.pasta.steering import log_strength
from tenfold.attend.text_marks import encode
from tenfold.evaluate.compare import paired_metric
from tenfold.evaluate.qa import exact_match, token_f1
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model

HEADS = {0: [1], 1: [0, 2]}
CONTEXT = "The dog is out. Ann has a cat. The cat is in the hut. It rains."
QUESTION = "Where is the cat?"
SENTENCE = "The cat is in the hut."
SPAN = (31, 53)
RIVERS = (
    "The Amazon River is in South America. It is the largest river by discharge. "
    "The Nile is often called the longest river. Its length is about 6,650 km."
)


@pytest.fixture(scope="module")
def opened():
    return tiny_model("llama")


def asking(opened, **settings):
    settings = {"heads": HEADS, "max_quote_tokens": 4, "max_answer_tokens": 5} | settings
    return AutoPasta(opened.model, opened.tokenizer, **settings)


def quoting(monkeypatch, quotes):
    """Let the model say these sentences, by question; what it read to get there stays."""
    identify = AutoPasta._identify

    def say(self, rows):
        return [quotes[row.question] for row in rows], identify(self, rows)[1]

    monkeypatch.setattr(AutoPasta, "_identify", say)


@pytest.fixture
def written(opened):
    """The next-token logits of every forward pass, and how many tokens it read."""
    found = []

    def keep(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        found.append((ids.shape[1], output.logits[:, -1].clone()))

    handle = opened.model.register_forward_hook(keep, with_kwargs=True)
    yield found
    handle.remove()


def test_01_delta_is_alpha(opened):
    delta = math.log(100)
    tail = [opened.tokenizer(" hut")["input_ids"]]
    arguments = ([QUESTION], [CONTEXT], [" hut"])
    ask = asking(opened, alpha=math.exp(-delta))
    marks = encode(opened.tokenizer, [ask.answering(QUESTION, CONTEXT, [SPAN])])
    assert torch.equal(log_strength(marks, 0.01)[~marks.marked].unique(), torch.tensor([-delta]))
    with steer(opened.model, marks, heads=HEADS, alpha=0.01):
        expected = likelihood(opened.model, marks, tail)
    found = ask.log_probabilities(*arguments, mode="gold", gold=[[SPAN]])
    assert torch.equal(found.total, expected.total)
    none = asking(opened, alpha=1.0)
    steered, direct = (none.log_probabilities(*arguments, mode=mode, gold=[[SPAN]]) for mode in ("gold", "direct"))
    assert torch.equal(steered.total, direct.total)
    assert not torch.equal(found.total, direct.total)
    assert none(QUESTION, CONTEXT, mode="gold", gold=[SPAN]).answer == none(QUESTION, CONTEXT, mode="direct").answer


def test_02_same_ids(opened, monkeypatch):
    read = []
    monkeypatch.setattr(
        "tenfold.attend.autopasta.answering.encode", lambda *a, **k: read.append(encode(*a, **k)) or read[-1]
    )
    quoting(monkeypatch, {QUESTION: SENTENCE})
    ask = asking(opened)
    for mode in ("direct", "autopasta", "iterative"):
        ask(QUESTION, CONTEXT, mode=mode)
    _, direct, _, steered, _, iterative = read  # the first of all is the check of the constructor
    assert torch.equal(direct.input_ids, steered.input_ids)
    assert not direct.marked.any()
    assert steered.marked.any()
    assert SENTENCE not in opened.tokenizer.decode(direct.input_ids[0]).split("Question:")[1]
    assert SENTENCE in opened.tokenizer.decode(iterative.input_ids[0]).split("Question:")[1]


def test_03_splitter():
    text = (
        "Dr. Smith moved to Paris in 1999. He won the U.S. Open! Did he retire? No.\n"
        'His score was 3.14 points. "It is over." He left'
    )
    assert sentences(text) == [(0, 33), (34, 55), (56, 70), (71, 74), (75, 101), (102, 115), (116, 123)]
    assert sentences("") == sentences(" \n\t ") == []
    covered = {place for lo, hi in sentences(text) for place in range(lo, hi)}
    assert {place for place, character in enumerate(text) if not character.isspace()} <= covered


def test_04_mapping():
    spans = sentences(RIVERS)
    texts = [RIVERS[lo:hi] for lo, hi in spans]

    def cosines(quote):
        rows = bag_of_words([quote, *texts])
        return torch.nn.functional.cosine_similarity(rows[:1], rows[1:]).tolist()

    first, second = "The Nile is the longest river.", "The Nile has a length of about 6650 km."
    assert cosines(first) == pytest.approx([0.534522, 0.534522, 0.894427, 0.133631], abs=1e-6)
    assert cosines(second) == pytest.approx([0.125988, 0.125988, 0.316228, 0.377964], abs=1e-6)
    assert cosines("I do not know.") == [0.0] * 4
    assert [(hit.start, hit.end) for hit in locate_quote(first, RIVERS)] == [spans[2]]
    hit = locate_quote(second, RIVERS)[0]
    assert (hit.start, hit.end, hit.stage) == (*spans[3], "embedding")
    assert hit.score == pytest.approx(0.377964, abs=1e-6)
    assert locate_quote("I do not know.", RIVERS) == ()
    assert locate_quote(first, RIVERS)[0].score == pytest.approx(0.821918, abs=1e-6)  # the difflib ratio comes before
    for span, text in zip(spans, texts, strict=True):
        hit = locate_quote(text, RIVERS)[0]
        assert (hit.start, hit.end, hit.score, hit.stage) == (*span, 1.0, "exact")
    assert [(hit.start, hit.end) for hit in locate_quote(first, RIVERS, spans[:2])] == [spans[0]]  # a tie


@pytest.mark.parametrize("chat", [True, False])
def test_05_marked_tokens(opened, chat):
    context = f"{CONTEXT} {SENTENCE}"
    prompt = asking(opened, chat=chat).answering(f'"{SENTENCE}" Why?', context, [SPAN])
    assert prompt.text.count(SENTENCE) == 3
    assert [(span.start, span.end) for span in prompt.spans] == [
        (prompt.text.index(SENTENCE), prompt.text.index(SENTENCE) + len(SENTENCE))
    ]
    marks = encode(opened.tokenizer, [prompt])
    assert opened.tokenizer.decode(marks.input_ids[0][marks.marked[0]]) == SENTENCE
    assert len(marks.tokens(0)) == 1
    assert [hit.start for hit in locate_quote(SENTENCE, context)] == [SPAN[0]]
    assert len(locate_quote(SENTENCE, context, all_matches=True)) == 2


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("Paris, France", ["Paris"], 0, 0.666667),
        ("in the year 1999", ["1999"], 0, 0.5),
        ("New York City", ["NYC", "New York"], 0, 0.8),
        ("Barack Obama Barack", ["Barack Obama"], 0, 0.8),
        ("U.S.A.", ["USA"], 1, 1),
        ("twenty-one", ["twenty one"], 0, 0),
        ("the", ["a"], 1, 1),
        ("", ["x"], 0, 0),
    ],
)
def test_06_exact_match_and_f1(prediction, references, exact, f1):
    assert max(exact_match(prediction, right) for right in references) == exact
    assert max(token_f1(prediction, right) for right in references) == pytest.approx(f1, abs=1e-6)


def table(heads):
    return sum(math.sin(1.7 * (4 * layer + head + 1)) for layer, head in heads)


COUNTS = dict.fromkeys(range(6), 4)


def test_07_coarse_to_fine():
    found = coarse_to_fine(table, COUNTS, 3, per_layer=[2], pooled=[5])
    expected = [0.304422, 0.339637, 0.286137, 0.157896, -0.011588, -0.178045]
    assert list(found.coarse.values()) == pytest.approx(expected, abs=1e-6)
    assert found.layers == (1, 0, 2)
    assert found.ranking[:5] == ((2, 3), (0, 0), (1, 3), (1, 0), (0, 3))
    assert set(found.candidates) == {
        ((0, 0), (0, 3), (1, 0), (1, 3), (2, 3)),
        ((0, 0), (0, 3), (1, 0), (1, 3), (2, 0), (2, 3)),
    }
    assert len(found.coarse) + len(found.fine) == 6 + 12
    assert found.evaluations == 18 + 2
    assert (5, 2) not in found.fine  # third best of all, in a layer whose score says no


def test_08_exhaustive_once_resumable_deterministic():
    asked = Counter()

    def counting(heads):
        asked[heads] += 1
        return table(heads)

    full = coarse_to_fine(counting, COUNTS, 6, per_layer=[1, 1, 4, 9], pooled=[1, 5, 24, 99])
    exhaustive = sorted(((layer, head) for layer in COUNTS for head in range(4)), key=lambda head: -table([head]))
    assert list(full.ranking) == exhaustive
    assert set(asked.values()) == {1}
    assert full.evaluations == len(asked)

    known = {}

    def failing(heads):
        if len(known) == 10:
            raise KeyboardInterrupt
        return table(heads)

    with pytest.raises(KeyboardInterrupt):
        coarse_to_fine(failing, COUNTS, 3, known=known)
    assert len(known) == 10
    resumed, whole = (coarse_to_fine(table, COUNTS, 3, known=start) for start in (known, {}))
    assert resumed.evaluations == whole.evaluations - 10
    assert (resumed.heads, resumed.ranking) == (whole.heads, whole.ranking)
    backwards = coarse_to_fine(table, dict(reversed(COUNTS.items())), 3)
    assert backwards == whole

    tied = coarse_to_fine(lambda heads: 1.0, COUNTS, 2, per_layer=[2], pooled=[3, 2])
    assert tied.layers == (0, 1)
    assert tied.ranking == tuple((layer, head) for layer in (0, 1) for head in range(4))
    assert tied.heads == ((0, 0), (0, 1))


def state(model):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return hooks, model.config._attn_implementation, model.generation_config.to_dict(), model.training


def test_09_untouched(opened, monkeypatch):
    model, ask = opened.model, asking(opened)
    before = state(model)
    implementations = []
    handle = model.register_forward_pre_hook(lambda *_: implementations.append(model.config._attn_implementation))
    quoting(monkeypatch, {QUESTION: SENTENCE})
    ask(QUESTION, CONTEXT)
    handle.remove()
    assert implementations == sorted(implementations)
    assert Counter(implementations) == {"sdpa": 4, "tenfold_sdpa": 5}
    assert state(model) == before
    for error in (RuntimeError, KeyboardInterrupt):
        for last in (2, 6):  # in the first pass, in the second
            calls = iter(range(99))

            def fail(*_, calls=calls, last=last, error=error):
                if next(calls) == last:
                    raise error

            handle = model.register_forward_pre_hook(fail)
            with pytest.raises(error):
                ask(QUESTION, CONTEXT)
            handle.remove()
            assert state(model) == before


QUESTIONS = {
    QUESTION: SENTENCE,
    "Who has it?": "Ann has a cat.",
    "What is the time, please?": "I do not know.",
    "Is it wet?": "It rains.",
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("chat", [True, False])
def test_10_batch_is_singles(kind, chat, monkeypatch):
    quoting(monkeypatch, QUESTIONS)
    ask = asking(tiny_model(kind), chat=chat)
    questions = list(QUESTIONS)
    contexts = [CONTEXT, CONTEXT + " Ann is here.", CONTEXT, "It rains. " + CONTEXT[:30]]
    together = ask.batch(questions, contexts, batch_size=3)
    single = [ask(*row) for row in zip(questions, contexts, strict=True)]
    assert [answer.fallback for answer in single[:3]] == [False, False, True]
    for left, right in zip(together, single, strict=True):
        assert (left.answer, left.spans, left.fallback) == (right.answer, right.spans, right.fallback)
    tails = ["in the hut", "Ann", "x", "yes"]
    scores = ask.log_probabilities(questions, contexts, tails, batch_size=4)
    for row, arguments in enumerate(zip(questions, contexts, tails, strict=True)):
        alone = ask.log_probabilities(*([value] for value in arguments))
        torch.testing.assert_close(alone.total[0], scores.total[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.first[0], scores.first[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["autopasta", "iterative"])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("question", list(QUESTIONS))
def test_11_reuse(opened, written, question, chat, mode, monkeypatch):
    quoting(monkeypatch, QUESTIONS)
    answers, logits = [], []
    for reuse in (True, False):
        written.clear()
        answers.append(asking(opened, chat=chat, reuse=reuse)(question, CONTEXT, mode=mode))
        logits.append(torch.cat([last for _, last in written]))
        read = [tokens for tokens, _ in written if tokens > 1]
        assert read[1] + answers[-1].reused == len(prompt_ids(opened, chat, question, mode, answers[-1]))
    kept, anew = answers
    assert kept.answer == anew.answer
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    start = kept.spans[0][0] if kept.spans else len(CONTEXT)
    assert (kept.reused >= start, anew.reused) == (True, 0)


def prompt_ids(opened, chat, question, mode, answer):
    quote = answer.quote if mode == "iterative" and not answer.fallback else None
    return encode(opened.tokenizer, [asking(opened, chat=chat).answering(question, CONTEXT, quote=quote)]).input_ids[0]


def test_12_whole_context(opened):
    ask = asking(opened, chat=False)
    marks = encode(opened.tokenizer, [ask.answering(QUESTION, CONTEXT, [(0, len(CONTEXT))])])
    with torch.no_grad():
        plain = opened.model(**marks.inputs).logits
        with steer(opened.model, marks, heads=HEADS):
            steered = opened.model(**marks.inputs).logits
    torch.testing.assert_close(steered[:, : len(CONTEXT)], plain[:, : len(CONTEXT)], atol=1e-6, rtol=0)
    assert bool(((steered - plain)[:, len(CONTEXT) :].abs().amax(2) > 1e-4).all())
    assert ask(QUESTION, CONTEXT, mode="whole").spans == ((0, len(CONTEXT)),)


PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis")
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
FILLERS = ("The market opens early in the morning.", "It rained for most of the week.", "The bridge is very old.")


def bench(count):
    """Items of the offline bench: context, question, colours (the right one first), gold and distractor sentence."""
    draw, items = Random(13), []
    for _ in range(count):
        thing, people = draw.choice(("bicycle", "coat", "boat", "lamp")), draw.sample(PEOPLE, 6)
        colours = draw.sample(COLOURS, 6)
        about = [f"The {thing} of {person} is {colour}." for person, colour in zip(people, colours, strict=True)]
        order = draw.sample([*about, *FILLERS], 9)
        context = " ".join(order)
        spans = [(context.index(text), context.index(text) + len(text)) for text in about[:2]]
        which = f"{thing} of {people[0]}"
        question = f"What colour is the {which}?\nAnswer: The {which} is"
        items.append((context, question, [f" {colour}" for colour in colours], *spans))
    return items


@pytest.mark.slow
def test_13_direction():
    """Emphasis on the right sentence wins, on a wrong one it loses, and on everything it does not help.

    That last one is a statement about a difference near 0. "Whole context <= plain" rests on 12 items in section 4
    (.083 against .417, with heads found on conflicts alone), where one item is 8 points. With our heads 48 items give
    .52 against .48, within the error of either: comparing the two shares would test the draw of the items. So the same
    items are compared in pairs: a gain whose 95 % interval lies above 0 is a failure, as is a whole context that comes
    near its one sentence.
    """
    opened, items = open_model("demo", device="cpu"), bench(48)
    rows = [(context, question, colour) for context, question, colours, *_ in items for colour in colours]
    contexts, questions, colours = map(list, zip(*rows, strict=True))
    prompt = "{context}\nQuestion: {question}"

    def measure(mode, place=3, heads=None):
        """Of each item: whether the right one of six colours wins, and its probability."""
        ask = AutoPasta(opened.model, opened.tokenizer, heads=heads, answer_prompt=prompt, chat=False)
        gold = [[item[place]] for item in items for _ in COLOURS]
        first = ask.log_probabilities(questions, contexts, colours, mode=mode, gold=gold, batch_size=12).first
        first = first.view(-1, len(COLOURS))
        return (first.argmax(1) == 0).double(), first[:, 0].exp().double()

    plain, gold, distractor = measure("direct"), measure("gold"), measure("gold", place=4)
    whole, every = measure("whole"), measure("gold", heads="all")
    assert gold[0].mean() >= plain[0].mean() + 0.3
    assert distractor[0].mean() <= plain[0].mean() - 0.2
    gain = paired_metric("whole context - plain", whole[0] - plain[0])
    assert gain.interval[0] <= 0
    assert whole[0].mean() <= gold[0].mean() - 0.3
    assert every[0].mean() <= gold[0].mean()
    assert every[1].mean() < gold[1].mean()
