"""Steering of whole models: every implementation, cache and way to generate, and what is refused."""

import copy
import dataclasses
import itertools
import math
import shutil
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, GPTJConfig, GPTJForCausalLM, StaticCache
from transformers.utils import is_flash_attn_2_available

from tenfold.attend.attention import installed, self_attentions
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.profiles import (
    Profile,
    all_heads,
    by_layer,
    describe_model,
    load_profile,
    parse_heads,
    save_profile,
)
from tenfold.attend.pasta.steering import log_strength
from tenfold.attend.text_marks import Marks
from tenfold.errors import ConfigError, ModelError
from tenfold.models.tiny import tiny_model

HEADS = {0: [1], 1: [0, 3]}
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"]
FLASH = "made_up_flash"  # see conftest.py


def marks_of(length, *rows, pads=(), seed=0, strength=1.0):
    """Random tokens with one list of spans per row, and so many tokens of padding on the left."""
    ids = torch.randint(6, 200, (len(rows), length), generator=torch.Generator().manual_seed(seed))
    mask, marked = torch.ones_like(ids), torch.zeros(len(rows), length, dtype=torch.bool)
    for row, spans in enumerate(rows):
        for start, end in spans:
            marked[row, start:end] = True
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return Marks(ids, mask, marked, torch.where(marked, strength, 1.0))


def usual():
    """Padding in one row, other marks in each, and none in the last."""
    return marks_of(14, [(4, 6)], [(6, 9)], [], pads=(0, 3, 0))


def many():
    """More than a quarter of the tokens marked, which is done another way."""
    return marks_of(14, [(2, 6), (9, 11)], [(5, 13)], [], pads=(0, 3, 0))


def rows_of(marks, start, end):
    return Marks(*(getattr(marks, field.name)[start:end] for field in dataclasses.fields(marks)))


def model_of(kind="llama", implementation="sdpa"):
    model = tiny_model(kind).model
    model.config._attn_implementation = implementation
    return model


def logits(model, marks, **arguments):
    with torch.no_grad():
        found = model(**marks.inputs, **arguments).logits
    return found * marks.attention_mask[..., None]


def steered(model, marks, heads=HEADS, **settings):
    with steer(model, marks, heads=heads, **settings):
        return logits(model, marks)


def generate(model, marks, **settings):
    chosen = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        **settings,
    }
    found = model.generate(**marks.inputs, **chosen)
    return found.sequences, torch.stack(found.logits)


@contextmanager
def watched(model, layer, name):
    """What a layer's attention is called with, collected; to be opened within the steer block."""
    found = []
    hook = self_attentions(model)[layer].register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs.get(name)), with_kwargs=True
    )
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", [usual(), many()], ids=["few", "many"])
def test_implementations_agree(kind, implementation, marks):
    reference = model_of(kind, "eager")
    model = model_of(kind, implementation)
    plain, expected = logits(reference, marks), steered(reference, marks)
    assert (plain - expected)[:2].abs().max() > 0.01
    own = logits(model, marks)
    found = steered(model, marks)
    assert (found - expected).abs().max() < 1e-5
    assert torch.equal(found[2], own[2])  # the row without marks
    assert (found[0, :2] - own[0, :2]).abs().max() < 1e-6  # nothing is marked before
    assert torch.equal(logits(model, marks), own)
    with steer(reference, marks, heads=HEADS):
        text, scores = generate(reference, marks)
    plain_text = generate(model, marks)
    with steer(model, marks, heads=HEADS):
        own_text, own_scores = generate(model, marks)
    assert torch.equal(own_text, text)
    assert (own_scores - scores).abs().max() < 1e-5
    if implementation == FLASH:  # two more channels, and the sum of the same numbers may be rounded otherwise
        assert (own_scores[:, 2] - plain_text[1][:, 2]).abs().max() < 1e-5
    else:
        assert torch.equal(own_scores[:, 2], plain_text[1][:, 2])
    assert all(map(torch.equal, generate(model, marks), plain_text))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_other_strengths_and_heads_agree(kind):
    cases = (
        {"alpha": 0},
        {"alpha": 10},
        {"alpha": 0.3, "generated": "scale"},
        {"keep_sink": True},
        {"heads": "all"},
        {"heads": {1: [2]}},
    )
    for case in cases:
        for marks in (usual(), marks_of(14, [(4, 6)], [(6, 9)], [], pads=(0, 3, 0), strength=0.2)):
            found = {}
            for implementation in ("eager", "sdpa", FLASH):
                model = model_of(kind, implementation)
                with steer(model, marks, **{"heads": HEADS, **case}):
                    found[implementation] = logits(model, marks), generate(model, marks)[1]
            for implementation in ("sdpa", FLASH):
                for one, other in zip(found[implementation], found["eager"], strict=True):
                    assert (one - other).abs().max() < 1e-5


@pytest.mark.slow  # flex attention is compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch and transformers warn of each other
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on the CPU needs a C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_flex_agrees(kind):
    """Forward only: with a second shape torch 2.13 writes C++ that does not compile, steered or not."""
    torch._dynamo.reset()
    model, marks = model_of(kind), usual()
    model.set_attn_implementation("flex_attention")
    plain = logits(model, marks)
    found = steered(model, marks)
    assert (found - steered(model_of(kind, "eager"), marks)).abs().max() < 1e-5
    assert torch.equal(found[2], plain[2])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
def test_beams_and_samples(implementation):
    marks, model, reference = usual(), model_of("qwen3", implementation), model_of("qwen3", "eager")
    for settings in (
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.5},
    ):
        found = []
        for one in (reference, model):
            torch.manual_seed(3)
            with steer(one, marks, heads=HEADS):
                found.append(one.generate(**marks.inputs, **{"max_new_tokens": 5, "do_sample": False, **settings}))
        assert torch.equal(*found)
        torch.manual_seed(3)
        plain = model.generate(**marks.inputs, **{"max_new_tokens": 5, "do_sample": False, **settings})
        assert plain.shape == found[0].shape
        assert not torch.equal(plain, found[0])
    # A beam of row r is steered by the marks of row r: as when the row is alone.
    with steer(model, marks, heads=HEADS):
        together = model.generate(**marks.inputs, max_new_tokens=5, do_sample=False, num_beams=3)
    for row in range(3):
        one = rows_of(marks, row, row + 1)
        with steer(model, one, heads=HEADS):
            alone = model.generate(**one.inputs, max_new_tokens=5, do_sample=False, num_beams=3)
        assert torch.equal(alone[0], together[row])


def read(model, ids, mask, cache, cuts):
    """Logits of a text that is read in pieces."""
    found, edges = [], [0, *cuts, ids.shape[1]]
    for start, end in itertools.pairwise(edges):
        given = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": cache is not None}
        with torch.no_grad():
            found.append(model(ids[:, start:end], **given).logits)
    return torch.cat(found, 1) * mask[..., None]


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("generated", ["keep", "scale"])
def test_caches_agree(kind, implementation, generated):
    """Gemma's first layer sees 32 tokens of 44, and its marks are among the last 32 at every step."""
    model = model_of(kind, implementation)
    marks = marks_of(40, [(20, 23)], [(25, 28)], [], pads=(0, 3, 0))
    written = torch.randint(6, 200, (3, 4), generator=torch.Generator().manual_seed(5))
    ids, mask = torch.cat([marks.input_ids, written], 1), torch.ones(3, 44, dtype=torch.int64)
    mask[1, :3] = 0
    with steer(model, marks, heads=HEADS, generated=generated):
        expected = read(model, ids, mask, None, [])
        for cuts in ([40, 41, 42, 43], [4, 40, 41, 42, 43], [22, 35, 36, 41], [4, 5, 24, 39, 42], [34, 38, 40]):
            found = read(model, ids, mask, DynamicCache(config=model.config), cuts)
            assert (found - expected).abs().max() < 1e-5, cuts
            if implementation == FLASH:  # the real one cuts static caches by itself
                continue
            found = read(model, ids, mask, StaticCache(config=model.config, max_cache_len=50), cuts)
            assert (found - expected).abs().max() < 1e-5, cuts
    assert (read(model, ids, mask, None, []) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_caches_of_generate_agree(kind):
    model, marks = model_of(kind), marks_of(30, [(12, 16)], [(20, 21)], pads=(4, 0))
    with steer(model, marks, heads=HEADS):
        text, scores = generate(model, marks)
        for settings in (
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
            {"prefill_chunk_size": 7},
            {"prefill_chunk_size": 1},
        ):
            other, others = generate(model, marks, **settings)
            assert torch.equal(other, text)
            assert (others - scores).abs().max() < 1e-5, settings


def test_a_plain_cache_may_be_used_up_to_the_first_mark():
    model, marks = model_of(), marks_of(14, [(6, 8)])
    expected = steered(model, marks)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        start = model(marks.input_ids[:, :6], past_key_values=cache).logits
        with steer(model, marks, heads=HEADS):
            rest = model(marks.input_ids[:, 6:], past_key_values=cache).logits
    assert (torch.cat([start, rest], 1) - expected).abs().max() < 1e-5


def test_sliding_windows():
    model = model_of("gemma3")  # layer 0 sees 32 tokens, layer 1 all
    far, near = marks_of(40, [(5, 8)]), marks_of(40, [(5, 9)])
    for marks, row in ((far, 0), (marks_of(40, [(30, 31)], [(5, 8)]), 1)):
        said = f"prompt {row + 1}: head 2 of layer 0 does not reach .* nor does any other"
        refused = pytest.raises(ConfigError, match=said)
        with refused, steer(model, marks, heads={0: [2, 3]}):
            pass
    with steer(model, far, heads={1: [0]}) as found:  # a layer without window
        assert found.heads == {1: (0,)}
        logits(model, far)
    # The last of the prompt still sees one marked token, the first that is written sees none.
    for generated in ("keep", "scale"):
        with (
            steer(model, near, heads=HEADS, generated=generated),
            watched(model, 0, "key_bias") as local,
            watched(model, 1, "key_bias") as full,
        ):
            generate(model, near, max_new_tokens=3)
        assert [bool(bias.values.any()) for (bias,) in local] == [True, False, False]
        assert [bool(bias.values.any()) for (bias,) in full] == [True, True, True]
        assert [bias.values.shape[1] for (bias,) in local] == [40, 32, 32]
        written = math.log(0.01) if generated == "scale" else 0.0
        assert full[-1][0].values[0, 40:].tolist() == pytest.approx([written] * 2)


def test_a_marked_end_stays_weakened_while_its_window_shows_it():
    """De-emphasis: the unmarked prompt has left the window, the marked end of it has not."""
    model = model_of("gemma3")
    marks = marks_of(36, [(30, 36)], strength=0.2)
    ids = torch.cat([marks.input_ids, torch.full((1, 31), 9)], 1)
    cache = DynamicCache(config=model.config)
    with steer(model, marks, heads={0: [1]}, alpha=1), watched(model, 0, "key_bias") as found:
        read(model, ids, torch.ones_like(ids), cache, range(36, 67))
    last = found[-1][0]  # the text of 67 tokens: keys 35 to 66
    assert last.values[0].tolist() == pytest.approx([math.log(0.2)] + [0.0] * 31)
    assert found[-2][0].values[0, :2].tolist() == pytest.approx([math.log(0.2)] * 2)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_compiled_in_one_graph(kind):
    torch._dynamo.reset()
    model = model_of(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = usual(), marks_of(14, [(2, 3)], [], [(9, 13)], pads=(0, 3, 0), seed=1)

    def check(marks):
        expected = logits(model, marks)
        assert (logits(compiled, marks) - expected).abs().max() < 1e-5
        return expected

    plain = check(first)
    with steer(model, first, heads=HEADS):
        assert (check(first) - plain).abs().max() > 0.01
    # The graph is not reused where another block has other marks, heads or strengths.
    with steer(model, second, heads=HEADS):
        check(second)
    with steer(model, first, heads={0: [2]}, alpha=0.3):
        check(first)
        with steer(model, first, heads={1: [2]}):
            check(first)
    assert torch.equal(check(first), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # renamed in transformers 5.23
def test_gradients_flow(implementation, checkpointing):
    marks = usual()
    labels = marks.input_ids.masked_fill(marks.attention_mask.cumsum(1) <= 1, -100)  # no padding predicts anything

    def gradients(implementation, **settings):
        model = model_of("llama", implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with steer(model, marks, heads=HEADS, **settings):
            model(**marks.inputs, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    found, expected, plain = gradients(implementation), gradients("eager"), gradients(implementation, alpha=1)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5, name
    assert any((found[name] - plain[name]).abs().max() > 1e-3 for name in plain)


def test_a_model_learns_while_steered():
    model, marks = model_of().train(), usual()
    labels = marks.input_ids.masked_fill(marks.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    with steer(model, marks, heads=HEADS):
        for _ in range(8):
            loss = model(**marks.inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(implementation, dtype):
    marks = usual()
    expected = steered(model_of(), marks)
    model = model_of("llama", implementation).to(dtype)
    found = steered(model, marks)
    assert found.dtype == dtype
    effect = (expected - logits(model_of(), marks)).abs().max()
    assert (found.float() - expected).abs().max() < effect / 5


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
def test_nested_blocks_add_up(implementation):
    model, marks = model_of("llama", implementation), usual()
    expected = steered(model, marks, alpha=0.02)
    with steer(model, marks, heads=HEADS, alpha=0.2):
        inside = logits(model, marks)
        assert (steered(model, marks, alpha=0.1) - expected).abs().max() < 1e-5
        assert torch.equal(logits(model, marks), inside)
    # Other marks on other heads, in either order.
    other = dataclasses.replace(marks, marked=marks.marked.roll(1, 0))
    found = []
    for blocks in ([(marks, {0: [1]}), (other, {0: [1, 2]})], [(other, {0: [1, 2]}), (marks, {0: [1]})]):
        with steer(model, blocks[0][0], heads=blocks[0][1]), steer(model, blocks[1][0], heads=blocks[1][1]):
            found.append(logits(model, marks))
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert (found[0] - steered(model, marks, {0: [1]})).abs().max() > 0.01


def test_two_models_at_once():
    marks, one, other = usual(), model_of(), model_of("qwen2", "eager")
    alone = steered(one, marks), steered(other, marks, {1: [2]}, alpha=0.1)
    plain = logits(one, marks), logits(other, marks)
    with steer(one, marks, heads=HEADS), steer(other, marks, heads={1: [2]}, alpha=0.1):
        assert torch.equal(logits(one, marks), alone[0])
        assert torch.equal(logits(other, marks), alone[1])
    assert torch.equal(logits(one, marks), plain[0])
    assert torch.equal(logits(other, marks), plain[1])
    # A copy made before the block has nothing of it.
    with steer(one, marks, heads=HEADS):
        pass
    assert torch.equal(logits(copy.deepcopy(one), marks), plain[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
def test_leaving_restores_the_model(implementation):
    model, marks = model_of("llama", implementation), usual()
    plain = logits(model, marks)

    def interrupted():
        with steer(model, marks, heads=HEADS):
            assert model.config._attn_implementation == f"tenfold_{implementation}"
            assert not torch.equal(logits(model, marks), plain)
            raise KeyboardInterrupt

    def refused():
        with steer(model, marks, heads=HEADS):
            logits(model, marks_of(14, [], seed=9))

    for use, error in ((interrupted, KeyboardInterrupt), (refused, ConfigError)):
        with pytest.raises(error):
            use()
        assert model.config._attn_implementation == implementation
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.equal(logits(model, marks), plain)


def test_other_inputs_are_refused():
    model, marks = model_of(), usual()
    ids, mask = marks.input_ids, marks.attention_mask
    with steer(model, marks, heads=HEADS) as found:
        assert found.report() == {"layers": 2, "heads": 3, "marked tokens": 5, "prompt tokens": 42}
        for other in (ids.flip(0), ids + 1, ids[:, 1:], ids.repeat(2, 1)):  # rows of beams are repeated in place
            with pytest.raises(ConfigError, match="other tokens than the marks"), torch.no_grad():
                model(other)
            with pytest.raises(ConfigError, match="other tokens than the marks"), torch.no_grad():
                model(input_ids=other)
        for other in (ids[:2], ids[:1], torch.cat([ids, ids[:1]])):
            with pytest.raises(ConfigError, match="marks of 3 rows, but the model got a batch"), torch.no_grad():
                model(other)
        with torch.no_grad():
            twice = model(ids.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0)).logits
            once = model(ids, attention_mask=mask).logits
            embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
        assert (twice[::2] - once).abs().max() < 1e-5
        assert torch.equal(embedded, once)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :4], past_key_values=cache, attention_mask=mask[:, :4])
            with pytest.raises(ConfigError, match="other tokens than the marks"):
                model(ids[:, 3:], past_key_values=cache, attention_mask=torch.cat([mask[:, :4], mask[:, 3:]], 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha: -0.1"),
        ({"alpha": math.nan}, "alpha: nan"),
        ({"alpha": math.inf}, "alpha: inf"),
        ({"generated": "drop"}, "generated: 'drop'"),
        ({"target_mass": 0.0}, "target_mass: 0.0"),
        ({"target_mass": 1}, "target_mass: 1"),
        ({"target_mass": math.nan}, "target_mass: nan"),
        ({"heads": {2: [0]}}, "heads: layer 2; .* layers 0 to 1"),
        ({"heads": {-1: [0]}}, "heads: layer -1"),
        ({"heads": {0: [4]}}, "heads: head 4 of layer 0; .* 0 to 3"),
        ({"heads": {0: [-1]}}, "heads: head -1 of layer 0"),
        ({"heads": "every"}, "heads: 'every'"),
        ({"heads": None, "profile": "absent"}, "profile: no 'absent'"),
        ({"heads": None, "profile": "absent.json"}, "profile: no file absent.json"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    model = model_of()
    with pytest.raises(ConfigError, match=message), steer(model, usual(), **{"heads": HEADS, **settings}):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_steered():
    gptj = GPTJForCausalLM(GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=200, rotary_dim=4))
    for model in (gptj, tiny_model("t5").model, tiny_model("deberta-v2").model):
        with pytest.raises(ModelError, match=type(model).__name__), steer(model, usual(), heads={0: [0]}):
            pass


def test_tokens_that_the_marks_do_not_count_are_refused():
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    for config in (PromptTuningConfig(**settings), PrefixTuningConfig(**settings)):
        adapted = get_peft_model(model_of(), config)
        with pytest.raises(ModelError, match="virtual tokens"), steer(adapted, usual(), heads=HEADS):
            pass
    model, marks = model_of(), usual()
    attention, hidden = self_attentions(model)[0], torch.zeros(3, 14, 64)
    with steer(model, marks, heads=HEADS), pytest.raises(ModelError, match="continuous batching"):
        attention(hidden, cache=object())


def test_all_heads_only_when_asked_for():
    model, marks = model_of("qwen2"), usual()
    with steer(model, marks, heads="all") as found:
        assert found.heads == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
        every = logits(model, marks)
    assert torch.equal(every, steered(model, marks, by_layer(all_heads(model))))
    assert (every - steered(model, marks)).abs().max() > 0.01


def test_an_adapter_stays_in_effect():
    marks = usual()
    model = model_of()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    plain = logits(adapted, marks)
    found = steered(adapted, marks)
    with steer(adapted, marks, heads=HEADS):
        text = generate(adapted, marks)
    assert torch.equal(logits(adapted, marks), plain)
    merged = adapted.merge_and_unload()
    assert (found - steered(merged, marks)).abs().max() < 1e-5
    with steer(merged, marks, heads=HEADS):
        assert torch.equal(generate(merged, marks)[0], text[0])
    assert (found - steered(model_of(), marks)).abs().max() > 1e-3


def test_profiles_know_their_model(tmp_path):
    model, marks = model_of(), usual()
    profile = Profile({0: (1,), 1: (0, 3)}, describe_model(model), ("facts",), ({"heads": 3},), {"alpha": 0.01})
    assert profile.size == 3
    path = save_profile(profile, tmp_path / "mine.json")
    assert load_profile(path) == profile
    for given in (profile, path, str(path)):
        with steer(model, marks, profile=given) as found:
            assert found.heads == profile.heads
            assert torch.equal(logits(model, marks), steered(model_of(), marks))
    # The fingerprint does not depend on the precision, nor on an adapter, but an adapter is warned of.
    with steer(model_of().to(torch.bfloat16), marks, profile=profile):
        pass
    others = tiny_model("llama", seed=1).model
    with (
        pytest.warns(UserWarning, match="found on other weights.*the weights are others"),
        steer(others, marks, profile=path),
    ):
        pass
    adapted = get_peft_model(model_of(), LoraConfig(target_modules=["q_proj"], r=2))
    assert describe_model(adapted) == describe_model(model)
    with pytest.warns(UserWarning, match="an adapter is on the model"), steer(adapted, marks, profile=path):
        pass
    for fields in ({"num_hidden_layers": 3}, {"num_attention_heads": 8}):
        with pytest.raises(ConfigError, match="made for a llama model of 2 layers with 4 heads"):
            steer(tiny_model("llama", **fields).model, marks, profile=path).__enter__()
    # Released files know no model: heads that are not there are refused.
    with pytest.raises(ConfigError, match="heads: layer 9"), steer(model, marks, profile=Profile({9: (0,)})):
        pass


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", '"text"', '{"a": [1]}', '{"1": 3}', '{"1": ["x"]}', "{", '{"format": "tenfold-heads-1"}', '{"1": null}'],
)
def test_files_that_are_no_profile(tmp_path, text):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"heads\.json"):
        load_profile(path)


def test_head_files_are_put_in_order():
    assert parse_heads({"10": [3, 1, 3], "2": [0]}) == {2: (0,), 10: (1, 3)}
    assert list(parse_heads({"10": [1], "2": [0]})) == [2, 10]


def test_log_strengths_are_bounded():
    marks = marks_of(3, [(1, 2)], strength=1e-20)
    assert log_strength(marks, 0).tolist() == [[-30.0] * 3]
    assert log_strength(marks, 1e20).tolist() == [[30.0, -30.0, 30.0]]
    model = model_of()
    with steer(model, marks, heads=HEADS, alpha=1e20, generated="scale"), watched(model, 0, "key_bias") as found:
        generate(model, marks, max_new_tokens=2)
    assert found[-1][0].values.tolist() == [[30.0, -30.0, 30.0, 30.0]]


def test_the_sink_can_be_kept():
    marks = marks_of(8, [(4, 6)], [(2, 4)], [], pads=(0, 2, 3))
    a = math.log(0.01)
    kept = log_strength(marks, 0.01, keep_sink=True)
    expected = torch.tensor([[0, a, a, a, 0, 0, a, a], [a, a, 0, 0, a, a, a, a], [0.0] * 8])
    assert torch.allclose(kept, expected)  # row 1 begins with its mark
    marks = dataclasses.replace(marks, strength=torch.where(marks.marked, 0.5, 1.0))
    assert float(log_strength(marks, 0.01, keep_sink=True)[1, 2]) == pytest.approx(math.log(0.5))
    model = model_of()
    assert (steered(model, marks, keep_sink=True) - steered(model, marks)).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("kind", "marks"),
    [("qwen3", usual()), ("qwen3", many()), ("gemma3", marks_of(40, [(20, 23)], [(25, 28)], [], pads=(0, 3, 0)))],
    ids=["few", "many", "window"],
)
def test_target_mass_is_met_by_every_row_below_it(kind, implementation, marks):
    """Shares are read off with values that are 1 on the marks, in every query, head and step."""
    model = model_of(kind, implementation)
    length = marks.marked.shape[1]

    def shares(layer, **settings):
        found = []

        def probe(_, value, read):
            keys = value.shape[2]  # of a window: the last ones
            marked = torch.nn.functional.pad(marks.marked, (0, len(found)))[:, length + len(found) - keys :]
            indicator = marked[:, None, :, None].to(value.dtype).expand_as(value).contiguous()
            found.append(read(indicator)[..., 0])

        def hand(module, args, kwargs):
            return args, {**kwargs, "probe": probe}

        with installed(model), steer(model, marks, heads={layer: [1, 2]}, **settings):
            hook = self_attentions(model)[layer].register_forward_pre_hook(hand, with_kwargs=True)
            generate(model, marks, max_new_tokens=4)
            hook.remove()
        return found

    plain, real = shares(0, alpha=1), marks.attention_mask.bool()
    for target in (0.2, 0.5, 0.95):
        lifted = shares(0, target_mass=target)
        for step, (before, after) in enumerate(zip(plain, lifted, strict=True)):
            # Of the prompt, layer 0 reads the same in both; later the token that was written may be another one.
            for row in range(3):
                sees = before[row, :, 1] > 0  # not those before the mark
                sees = sees & real[row] if step == 0 else sees
                known, now = before[row][sees], after[row][sees]
                if step == 0:
                    assert torch.allclose(now[:, [0, 3]], known[:, [0, 3]], atol=1e-6)
                    assert torch.allclose(now[:, [1, 2]], known[:, [1, 2]].clamp(min=target), atol=1e-5)
                    assert (known[:, [1, 2]] < target).any() or row == 2 or target == 0.2
                else:
                    assert (now[:, [1, 2]] > target - 1e-5).all()
            assert not after[2].any()


def test_target_mass_needs_a_normaliser():
    for implementation in (FLASH, "flex_attention"):
        model = model_of("llama", implementation)
        with pytest.raises(ConfigError, match="target_mass"), steer(model, usual(), heads=HEADS, target_mass=0.3):
            pass
        assert model.config._attn_implementation == implementation
    model = model_of()
    with (
        steer(model, usual(), heads=HEADS, target_mass=0.3),
        steer(model, usual(), heads=HEADS),
        pytest.raises(ConfigError, match="another steer block"),
    ):
        logits(model, usual())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind):
    marks = usual()
    there = marks.to("cuda")
    expected = steered(model_of(kind), marks)
    effect = (expected - logits(model_of(kind), marks)).abs().max()
    with steer(reference := model_of(kind), marks, heads=HEADS):
        text = generate(reference, marks)
    cases = [("sdpa", torch.float32, 1e-3), ("eager", torch.float32, 1e-3), ("sdpa", torch.bfloat16, effect / 5)]
    if is_flash_attn_2_available() and kind != "gpt2":
        cases.append(("flash_attention_2", torch.bfloat16, effect / 5))
    for implementation, dtype, tolerance in cases:
        model = model_of(kind).to("cuda", dtype)
        model.set_attn_implementation(implementation)
        found = steered(model, there)
        assert (found.float().cpu() - expected).abs().max() < tolerance
        with steer(model, there, heads=HEADS):
            first = generate(model, there)[1][0]
        assert (first.float().cpu() - text[1][0]).abs().max() < tolerance
        # Marks that stayed on the CPU are taken along.
        with steer(model, marks, heads=HEADS):
            assert torch.equal(logits(model, there), found)
