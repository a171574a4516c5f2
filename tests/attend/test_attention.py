"""The attention function: where it is put, what it leaves alone, and that all implementations give the same result."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tenfold.attend.attention import attention, base_implementation, installed, self_attentions
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.attend.text_marks import encode, from_tags
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.biased import KeyBias
from tenfold.models.tiny import tiny_model, tiny_tokenizer

FLASH = "made_up_flash"  # see conftest.py


@pytest.fixture(scope="module")
def module():
    """Attention of 4 query heads over 2 key heads."""
    return tiny_model("llama").model.model.layers[0].self_attn


def problem(queries=12, keys=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def biases(keys=12, before=0):
    """One of heads 0 and 3 with few raised keys, and one of head 3 with any values; after so many earlier queries."""
    values = torch.full((2, keys), math.log(0.01))
    values[0, 3:5], values[1, 6] = 0.0, 1.0
    raised = torch.tensor([[3, 4], [6, -1]])
    few = KeyBias(torch.tensor([0, 3]), values, raised, torch.full((2,), math.log(0.01)), first=max(0, 3 - before))
    any_values = torch.randn(2, keys, generator=torch.Generator().manual_seed(1))
    return few, KeyBias(torch.tensor([3]), any_values)


def padded(queries=12, keys=12):
    """A boolean mask with four tokens of padding in row 1."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :4] = False
    return mask


def additive(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def definition(query, key, value, mask, key_bias):
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)).double() / 4
    for bias in key_bias:
        scores = scores + bias.dense(4, torch.float64)
    weights = scores.masked_fill(~mask, torch.finfo(torch.float64).min).softmax(-1)
    return (weights @ value.repeat_interleave(2, 1).double()).transpose(1, 2)


def test_attentions_are_found_by_layer():
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"):
        found = self_attentions(tiny_model(kind).model)
        assert list(found) == [0, 1]
        assert all("Attention" in type(part).__name__ for part in found.values())
    model = tiny_model("llama").model
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert self_attentions(adapted)[1] is model.model.layers[1].self_attn
    crossed = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, add_cross_attention=True))
    assert self_attentions(crossed) == {0: crossed.transformer.h[0].attn}


def test_models_off_the_interface_are_refused():
    gptj = GPTJForCausalLM(GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=8, rotary_dim=4))
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=8))
    for model in (gptj, bloom, tiny_model("deberta-v2").model, torch.nn.Linear(1, 1)):
        with pytest.raises(ModelError, match=rf"{type(model).__name__}: no causal self-attention"):
            self_attentions(model)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration: a model of encoder and decoder"):
        self_attentions(tiny_model("t5").model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_what_nothing_touches_stays_bit_identical(kind, implementation):
    model = tiny_model(kind).model
    model.config._attn_implementation = implementation
    inputs = {"input_ids": torch.arange(6, 86).view(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.int64)}
    inputs["attention_mask"][1, :5] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain, text = model(**inputs).logits, model.generate(**inputs, **settings)
    with installed(model):
        assert model.config._attn_implementation == f"tenfold_{implementation}"
        assert base_implementation(model.config) == implementation
        assert torch.equal(model(**inputs).logits, plain)
        again = model.generate(**inputs, **settings)
    assert torch.equal(again.sequences, text.sequences)
    assert all(map(torch.equal, again.logits, text.logits))
    assert model.config._attn_implementation == implementation
    # Padding is seen to be padding: without a mask function of its own the name would read it.
    inputs["input_ids"][1, :5] = 77
    with installed(model):
        assert torch.equal(model(**inputs).logits[1, 5:], plain[1, 5:])


def test_installing_nests_and_ends_with_an_error():
    model, other = tiny_model("llama").model, tiny_model("qwen2").model
    other.set_attn_implementation("eager")

    def names():
        return model.config._attn_implementation, other.config._attn_implementation

    def fail():
        with installed(model), installed(other):
            with installed(model):
                assert names() == ("tenfold_sdpa", "tenfold_eager")
            assert names() == ("tenfold_sdpa", "tenfold_eager")
            raise KeyError("an error of the user")

    with pytest.raises(KeyError):
        fail()
    assert names() == ("sdpa", "eager")


@pytest.mark.parametrize("base", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (1, 12), (5, 12)])
@pytest.mark.parametrize("padding", [False, True])
def test_biased_attention_equals_its_definition(module, base, which, dtype, queries, keys, padding):
    query, key, value = problem(queries, keys, dtype)
    key_bias = tuple(biases(keys, keys - queries)[i] for i in which)
    mask = padded(queries, keys)
    if not padding:
        mask[1] = mask[0]
    expected = definition(query, key, value, mask, key_bias)
    given = {
        "sdpa": mask if padding or queries == 5 else None,
        "eager": additive(mask, dtype),
        FLASH: mask[:, 0, -1] if padding else None,
    }[base]
    found = attention(module, query, key, value, given, base=base, key_bias=key_bias, scaling=0.25, dropout=0.0)[0]
    seen = mask.any(-1).squeeze(1)  # a row of padding that sees nothing may have anything finite
    # Eager attention has its softmax in float32 whatever the inputs are.
    tolerance = 1e-12 if dtype == torch.float64 and base != "eager" else 3e-6
    if dtype == torch.float64 and base == "eager" and padding and queries == 12:
        assert (found[seen].double() - expected[seen]).abs().max() < tolerance  # its padding is NaN, as without us
        return
    assert found.isfinite().all()
    assert (found[seen].double() - expected[seen]).abs().max() < tolerance
    assert found.shape == (2, queries, 4, 16)
    assert found.is_contiguous()


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("few", [True, False])
def test_masks_may_differ_between_heads(module, kind, few):
    query, key, value = problem()
    mask = padded().repeat(1, 4, 1, 1)
    mask[:, 3, 6:, 3] = False
    mask[:, 1, 6:, 4] = False
    key_bias = (biases()[0],) if few else (KeyBias(torch.tensor([0, 3]), biases()[0].values),)
    expected = definition(query, key, value, mask, key_bias)
    given = mask if kind == "boolean" else additive(mask, torch.float32)
    for base in ("sdpa", "eager"):
        found = attention(module, query, key, value, given, base=base, key_bias=key_bias, scaling=0.25)[0]
        assert (found[0].double() - expected[0]).abs().max() < 3e-6
        assert (found[1, 4:].double() - expected[1, 4:]).abs().max() < 3e-6


@pytest.mark.parametrize("base", ["sdpa", "eager", FLASH])
def test_weights_of_heads(module, base):
    query, key, value = problem()
    weights = torch.tensor([[0.5, 2.0], [0.0, -1.0]])
    key_bias = (KeyBias(torch.tensor([0, 3]), biases()[0].values, weights=weights),)
    mask = padded()
    mask[1] = mask[0]
    expected = definition(query, key, value, mask, key_bias)
    given = additive(mask, torch.float32) if base == "eager" else None
    found = attention(module, query, key, value, given, base=base, key_bias=key_bias, scaling=0.25)[0]
    assert (found.double() - expected).abs().max() < 3e-6


def test_heads_without_bias_are_the_plain_ones(module):
    query, key, value = problem()
    plain = attention(module, query, key, value, None, base="sdpa", scaling=0.25)[0]
    for bias in (biases()[0], KeyBias(torch.tensor([0, 3]), biases()[0].values)):
        found = attention(module, query, key, value, None, base="sdpa", key_bias=(bias,), scaling=0.25)[0]
        assert torch.equal(found[:, :, [1, 2]], plain[:, :, [1, 2]])
        assert not torch.equal(found[:, :, [0, 3]], plain[:, :, [0, 3]])


def test_the_unwritten_part_of_a_static_cache_is_not_read(module):
    query, key, value = problem(5, 12)
    key[:, :, 5:], value[:, :, 5:] = torch.nan, torch.nan
    mask = padded(5, 5)
    mask[1] = mask[0]
    for key_bias in ((biases()[0],), (biases()[1],), biases()):
        short = tuple(bias.first_keys(5) for bias in key_bias)
        expected = definition(query, key[:, :, :5], value[:, :, :5], mask, short)
        found = attention(module, query, key, value, None, base="sdpa", key_bias=key_bias, scaling=0.25)[0]
        assert (found.double() - expected).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", ["sdpa", "eager", FLASH])
def test_half_precision_is_near(module, base, dtype):
    query, key, value = problem(dtype=dtype)
    mask = padded()
    mask[1] = mask[0]
    given = additive(mask, dtype) if base == "eager" else None
    for key_bias in ((biases()[0],), biases()):
        expected = definition(query, key, value, mask, key_bias)
        found = attention(module, query, key, value, given, base=base, key_bias=key_bias, scaling=0.25)[0]
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() < (0.005 if dtype == torch.float16 else 0.05)


def test_dropout_is_applied_to_the_biased_weights(module):
    query, key, _ = problem()
    value = torch.ones(2, 2, 12, 16)  # weights that add up to 1 give 1, dropped ones do not
    for key_bias in ((biases()[0],), biases()):
        found = attention(module, query, key, value, None, base="sdpa", key_bias=key_bias, scaling=0.25, dropout=0.5)[0]
        assert not torch.allclose(found[:, 1:], torch.ones(()))


def test_what_cannot_be_right_is_refused(module):
    query, key, value = problem()
    few, other = biases()
    aimed = KeyBias(few.heads, torch.zeros(2, 12), few.raised, torch.zeros(2), target=0.5)

    def call(base, *key_bias, **arguments):
        return attention(module, query, key, value, None, base=base, key_bias=key_bias, scaling=0.25, **arguments)

    for base in ("sdpa", FLASH):
        with pytest.raises(ModelError, match="caps its scores"):
            call(base, few, softcap=50.0)
    with pytest.raises(ModelError, match="bias of positions"):
        call("sdpa", few, position_bias=torch.zeros(1, 4, 12, 12))
    for arguments in ({"softcap": 50.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ModelError, match="target_mass"):
            call("eager", aimed, **arguments)
    for key_bias in ((aimed, other), (few, aimed)):
        with pytest.raises(ConfigError, match="another steer block"):
            call("sdpa", *key_bias)


def test_a_flash_kernel_takes_no_more_than_256_channels(module):
    """The bias needs 8 of them: heads of 256, such as Gemma's, leave it no room."""

    def call(size, *key_bias):
        query, key, value = (part.repeat(1, 1, 1, size // 16) for part in problem())
        return attention(module, query, key, value, None, base=FLASH, key_bias=key_bias, scaling=0.01)[0]

    few, other = biases()
    assert call(240, few, other).shape[-1] == 240
    assert torch.equal(call(256), call(256))  # nothing is biased: nothing is in the way
    for size, key_bias in ((256, (few,)), (240, (few, other, few))):
        with pytest.raises(ModelError, match=rf"264 channels, and {FLASH} takes up to 256.*\n.*sdpa"):
            call(size, *key_bias)


def test_flex_attention_that_knows_no_bias_is_refused(module, monkeypatch):
    """Among the arguments of an older transformers the bias would be lost without a word."""
    query, key, value = problem()

    def call(*key_bias):
        return attention(module, query, key, value, None, base="flex_attention", key_bias=key_bias, scaling=0.25)

    def older(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return value, None

    def newer(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
        return position_bias, None

    few = biases()[0]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", newer)
    assert torch.equal(call(few)[0], few.dense(4, torch.float32).expand(-1, -1, 12, -1))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", older)
    assert call()[0] is value
    with pytest.raises(ModelError, match=r"takes no bias of keys\n.*-U transformers"):
        call(few)


@pytest.mark.parametrize("target_mass", [None, 0.5])
def test_heads_whose_values_have_another_size(target_mass):
    """Multi-head latent attention: every implementation gives what eager gives, or what the dose asks for."""
    config = DeepseekV3Config(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=12,
        first_k_dense_replace=2,
    )
    torch.manual_seed(0)
    model, found = DeepseekV3ForCausalLM(config).eval(), {}
    marks = encode(tiny_tokenizer(), [from_tags("It was long ago and <mark>red</mark>, she said.")])
    plain = model(**marks.inputs).logits
    for base in ("eager", "sdpa") if target_mass else ("eager", "sdpa", FLASH):
        model.config._attn_implementation = base
        with steer(model, marks, heads={0: [1], 1: [0, 2]}, target_mass=target_mass), torch.no_grad():
            found[base] = model(**marks.inputs).logits
            share = attention_mass(model, marks)
        if target_mass:
            assert share[[0, 1, 1], [1, 0, 2]] == pytest.approx(0.5, abs=1e-5)
        torch.testing.assert_close(found[base], found["eager"], atol=1e-5, rtol=0)
    assert not torch.allclose(found["eager"], plain, atol=1e-3)


def test_a_probe_sees_the_biased_attention(module):
    query, key, value = problem()
    seen = []

    def probe(layer, values, read):
        assert values is value
        indicator = torch.zeros_like(values)
        indicator[:, :, 3:5] = 1
        seen.append((layer, read(indicator)[..., 0]))

    mask = padded()
    mask[1] = mask[0]
    plain = attention(module, query, key, value, None, base="sdpa", scaling=0.25)[0]
    assert torch.equal(attention(module, query, key, value, None, base="sdpa", scaling=0.25, probe=probe)[0], plain)
    attention(module, query, key, value, None, base="sdpa", scaling=0.25, probe=probe, key_bias=biases())
    indicator = torch.zeros_like(value)
    indicator[:, :, 3:5] = 1
    for (layer, share), key_bias in zip(seen, ((), biases()), strict=True):
        assert layer == 0
        assert (share - definition(query, key, indicator, mask, key_bias)[..., 0]).abs().max() < 3e-6


def test_a_cache_under_another_name_is_seen():
    """GPT-NeoX hands its cache to attention as ``layer_past``: decoding with it is decoding without it."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=262, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model, tokenizer = GPTNeoXForCausalLM(config).eval(), tiny_tokenizer()
    marks = encode(tokenizer, [from_tags("It was <mark>red</mark>, she said."), from_tags("A <mark>b</mark> c.")])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    with steer(model, marks, heads={0: [1], 1: [0, 2]}):
        cached = model.generate(**marks.inputs, **options, return_dict_in_generate=True)
        alone = model.generate(**marks.inputs, **options, return_dict_in_generate=True, use_cache=False)
    plain = model.generate(**marks.inputs, **options, return_dict_in_generate=True)
    for first, second in zip(cached.logits, alone.logits, strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert not torch.allclose(plain.logits[-1], cached.logits[-1], atol=1e-4)
