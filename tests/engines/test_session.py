"""What a session adds to the contract: rows of one batch that have nothing in common, and a model left as it was."""

import pytest
import torch
from transformers import DynamicCache

from tenfold.attend import masformer
from tenfold.attend.chat_marks import MessageSpan
from tenfold.attend.text_marks import TextSpan
from tenfold.engines import session as module
from tenfold.engines.requests import Evidence, Request
from tenfold.engines.session import Session
from tenfold.errors import ConfigError, DataError, ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.generation import continue_inputs
from tenfold.models.memory import stored_bytes
from tenfold.models.tiny import tiny_model

HEADS = {0: [1], 1: [0, 2]}
PROMPT = "It was red, she said, and nobody believed it."


@pytest.fixture
def opened():
    """A model that never ends its turn by itself."""
    opened = tiny_model("llama")
    with torch.no_grad():
        opened.model.lm_head.weight[opened.tokenizer.eos_token_id] = 0  # its logit is 0, and others are above that
    return opened


def test_greedy_texts_are_those_of_transformers(opened):
    prompts = ["a", "a much longer prompt than the first", "bb"]
    opened.model.double()
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    chats = [opened.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]
    for texts, asked in ((prompts, [{"text": text} for text in prompts]), (chats, [{"messages": t} for t in talks])):
        right = []
        for text in texts:
            inputs = opened.tokenizer(text, return_tensors="pt", add_special_tokens=texts is prompts)
            right += continue_inputs(opened.model, opened.tokenizer, inputs, max_new_tokens=8)
        requests = [Request(**prompt, max_new_tokens=8) for prompt in asked]
        found = Session(opened, batch_size=2).generate(requests)
        assert [reply.text for reply in found] == right


def test_sampling_follows_the_distribution_at_its_temperature(opened):
    opened.model.double()
    requests = [Request("q", max_new_tokens=1, temperature=0.05, seed=seed) for seed in range(400)]
    replies = Session(opened, batch_size=400).generate(requests)
    with torch.no_grad():
        logits = opened.model(**opened.tokenizer("q", return_tensors="pt")).logits[0, -1]
    right = (logits / 0.05).softmax(-1)
    found = torch.bincount(torch.tensor([reply.token_ids[0] for reply in replies]), minlength=len(right)) / 400
    assert float((found - right).abs().max()) < 0.09  # 3.6 standard deviations of a share of one half
    assert float((found - right).abs().sum()) < 0.35


def test_a_batch_holds_rows_of_any_length_stop_and_temperature(opened):
    """The stop string is put together by several tokens; what another row stops at is no business of this one."""
    session = Session(opened)
    whole = session.generate([Request(PROMPT, max_new_tokens=20)])[0]
    stop = whole.text[5:9]
    requests = [
        Request(PROMPT, max_new_tokens=3),
        Request(PROMPT, max_new_tokens=20, stop=(stop,)),
        Request(PROMPT, max_new_tokens=20),
        Request(PROMPT, max_new_tokens=9, temperature=0.7, seed=5),
    ]
    first, second, third, fourth = session.generate(requests)
    assert (first.tokens, third.tokens, fourth.tokens) == (3, 20, 9)
    assert first.token_ids == whole.token_ids[:3]
    assert second.text == whole.text[: whole.text.index(stop)]
    assert second.tokens < 20  # it ended there, and was not only cut
    assert third.text == whole.text
    assert (first.finish, second.finish, third.finish) == ("length", "stop", "length")


def test_the_end_of_a_turn_is_counted_and_not_shown(opened, monkeypatch):
    whole = Session(opened).generate([Request(PROMPT, max_new_tokens=6)])[0]
    opened.model.generation_config.eos_token_id = [whole.token_ids[2]]
    reply = Session(opened).generate([Request(PROMPT, max_new_tokens=6)])[0]
    assert reply.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[2]) + 1]
    assert reply.finish == "stop"


def test_bytes_of_the_cache_are_those_of_its_tensors(opened):
    reply = Session(opened).generate([Request(PROMPT, max_new_tokens=4)])[0]
    cache = DynamicCache(config=opened.model.config)
    ids = torch.tensor([[*opened.tokenizer(PROMPT)["input_ids"], *reply.token_ids[:3]]])
    opened.model(input_ids=ids, past_key_values=cache)
    assert reply.cache_bytes == stored_bytes(cache)
    small = Session(opened, kv="gear:2,buffer=16,kernel=torch").generate([Request(PROMPT, max_new_tokens=4)])[0]
    assert small.cache_bytes < 0.5 * reply.cache_bytes


def test_nothing_is_left_behind_also_after_a_failure(opened, monkeypatch):
    model = opened.model.train()
    state, ids = torch.random.get_rng_state(), torch.arange(5, 40)[None]
    before = model.eval()(input_ids=ids).logits
    model.train()
    session = Session(opened, kv="gear:4,buffer=16,kernel=torch", heads=HEADS)
    requests = [
        Request(PROMPT, emphasis=("red",), max_new_tokens=3, temperature=1.0),
        Request(PROMPT, max_new_tokens=3),
        Request(evidence=Evidence("Who?", "Ann did. It rains."), max_new_tokens=3),
    ]
    session.generate(requests)
    session.score(requests, ["a"])

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Sampling, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        session.generate(requests)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    assert not [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert torch.equal(model.eval()(input_ids=ids).logits, before)


def test_a_converted_model_is_read_through_its_small_cache():
    opened = tiny_model("llama", num_hidden_layers=3)
    whole = Session(opened).generate([Request(PROMPT * 3, max_new_tokens=4)])[0]
    handle = masformer.convert(opened.model, full_layers=[1], span=AttentionWindow("sliding", 8))
    small = Session(opened).generate([Request(PROMPT * 3, max_new_tokens=4)])[0]
    assert small.cache_bytes < 0.5 * whole.cache_bytes
    handle.revert()
    assert Session(opened).generate([Request(PROMPT * 3, max_new_tokens=4)])[0].text == whole.text


def test_heads_that_see_no_mark_are_named_in_the_reply():
    opened = tiny_model("gemma3")
    prompt = PROMPT + " It is so. " * 8
    session = Session(opened, heads={0: [1], 1: [0]}, alpha=0.01)
    felt, plain = session.generate([Request(prompt, emphasis=("red",), max_new_tokens=2), Request(prompt)])
    assert "layer 0 heads 1" in felt.notes[0]
    assert plain.notes == ()


def test_a_place_is_emphasised_and_an_error_names_the_prompt_by_its_place(opened):
    """One occurrence of several, in a text and in a message; counted over all requests, not within a batch."""
    session = Session(opened, heads=HEADS, alpha=0.001, batch_size=1)
    text, at = "red or blue or red?", len("red or blue or ")
    talk = [{"role": "system", "content": "red"}, {"role": "user", "content": text}]
    requests = [
        Request(text, emphasis=(TextSpan(at, at + 3),)),
        Request(text, emphasis=("red",)),
        Request(messages=talk, emphasis=(MessageSpan(1, at, at + 3, 0.5),)),
    ]
    found = [session._prompt(request, index) for index, request in enumerate(requests)]
    assert [len(prompt.spans) for prompt in found] == [1, 2, 1]
    assert [found[2].text[span.start : span.end] for span in found[2].spans] == ["red"]
    assert found[2].text[found[2].spans[0].end] == "?"
    assert found[2].spans[0].strength == 0.5
    one, all_of_them = session.score(requests[:2], [" It"])
    assert one.log_probabilities != all_of_them.log_probabilities
    with pytest.raises(ConfigError, match="give a TextSpan of a text, a MessageSpan of messages"):
        Request(text, emphasis=(MessageSpan(0, 0, 3),))
    with pytest.raises(DataError, match=r"prompt 2: the span \[0, 99\)"):
        session.generate([requests[0], Request(text, emphasis=(TextSpan(0, 99),))])
    far = Session(tiny_model("gemma3"), heads={0: [1]}, batch_size=1)
    with pytest.raises(ConfigError, match="prompt 2: head 1 of layer 0 does not reach"):
        far.generate([Request("red"), Request("red" + " and so on" * 9, emphasis=("red",))])


def test_evidence_and_prompts_may_be_asked_together(opened):
    context = "Ann did it. It rains."
    requests = [
        Request(evidence=Evidence("Who?", context, "gold", ((0, 11),)), max_new_tokens=5),
        Request(PROMPT, max_new_tokens=2),
        Request(evidence=Evidence("Who?", context, "direct"), max_new_tokens=5, stop=("\n",)),
    ]
    gold, plain, direct = Session(opened, heads=HEADS).generate(requests)
    assert gold.found.spans == ((0, 11),)
    assert direct.found.spans == ()
    assert (gold.tokens, gold.finish, plain.tokens) == (5, "length", 2)
    assert gold.prompt_tokens == direct.prompt_tokens > len(context)
    assert plain.found is None


def test_what_cannot_be_meant_is_refused(opened):
    with pytest.raises(ConfigError, match="gear:5"):
        Session(opened, kv="gear:5")
    with pytest.raises(ConfigError, match="alpha"):
        Session(opened, alpha=-1)
    with pytest.raises(ConfigError, match="empty prompt"):
        Session(opened).generate([Request("")])
    opened.tokenizer.chat_template = "{% if true %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(DataError, match="prompt 2"):
        Session(opened).generate([Request("a"), Request(messages=[{"role": "user", "content": "b"}])])
    opened.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Session(opened).generate([Request(messages=[{"role": "user", "content": "b"}])])


def test_a_prompt_beyond_the_table_of_positions_is_refused():
    opened = tiny_model("gpt2")
    most = opened.model.config.max_position_embeddings
    fitting = opened.tokenizer.decode(opened.tokenizer("one two three " * most)["input_ids"][: most - 4])
    length = len(opened.tokenizer(fitting)["input_ids"])
    assert Session(opened).generate([Request(fitting, max_new_tokens=most - length)])[0].tokens > 0
    with pytest.raises(DataError, match=f"{most + 1} tokens to read and write, and the model was built for {most}"):
        Session(opened).generate([Request(fitting, max_new_tokens=most - length + 1)])
