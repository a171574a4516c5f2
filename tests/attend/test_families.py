"""Architectures whose attention is more than a plain softmax, or is not in every layer."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from tenfold.attend import masformer, spans
from tenfold.attend.attention import self_attentions
from tenfold.attend.masformer import native
from tenfold.cache.gear.layer import GearLayer
from tenfold.cache.span_layers import SpanLayer
from tenfold.cache.spans import SpanCache, formula_bytes, own_cache
from tenfold.config.gear import CacheConfig
from tenfold.errors import ConfigError, ModelError
from tenfold.evaluate.long_context import repeated
from tenfold.kernels.local import AttentionWindow
from tenfold.models.export import save_model
from tenfold.models.head_sizes import kv_heads
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model, tiny_tokenizer

COMMON = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = {"layer_types": ["full_attention"] * 4, "sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
CAPPED = {
    "gemma2": {**FULL, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
    "vaultgemma": {**FULL, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 16},
}
SUNK = {
    "gpt_oss": {**FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite_swa": FULL,
    "flint": {**FULL, **EXPERTS},
}
STRANGE = {**CAPPED, **SUNK}
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 64},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2, **LINEAR, **EXPERTS,
                   "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **MAMBA, "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA},
}  # fmt: skip
NEAR = AttentionWindow("sliding", 5, sinks=2)


def build(kind):
    base = AutoConfig.for_model(kind)
    fields = {key: value for key, value in COMMON.items() if hasattr(base, key)}
    config = AutoConfig.for_model(kind, **{**fields, **{**STRANGE, **HYBRIDS}[kind]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.data.normal_()
            if "q_proj" in name or "k_proj" in name or "qkv" in name:
                parameter.data *= 8  # scores large enough for a cap to bite
    return model


def some_ids(tokens=40):
    return torch.randint(10, 200, (2, tokens), generator=torch.Generator().manual_seed(0))


PADDED = (torch.arange(40) >= torch.tensor([[0], [9]])).long()


@torch.no_grad()
def logits(model, ids=None, **keys):
    ids = some_ids() if ids is None else ids
    if "attention_mask" in keys:
        keys["position_ids"] = (keys["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, use_cache=False, **keys).logits


@torch.no_grad()
def in_pieces(model, cache, first=12):
    """Logits of all tokens, the first few at once; Bamba has to be told positions, with every cache."""
    places = torch.arange(40).split([first, *[1] * (40 - first)])
    found = [
        model(input_ids=some_ids()[:, at], position_ids=at[None], past_key_values=cache, use_cache=True).logits
        for at in places
    ]
    return torch.cat(found, 1)


def masked(model, table):
    """The model's own eager attention under masks of all pairs, a layer at a time: what conversion has to compute."""

    def hook(module, args, kwargs):
        span = table.get(module.layer_idx)
        if span is None:
            return None
        index = torch.arange(40)
        seen = span.sees(index[:, None], index)
        mask = torch.zeros(1, 1, 40, 40).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask}

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self_attentions(model).values()]
    found = logits(model)
    for handle in hooks:
        handle.remove()
    model.set_attn_implementation(before)
    return found


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [*STRANGE, *HYBRIDS])
def test_all_layers_full_are_the_unconverted_model(kind):
    model = build(kind)
    layers = sorted(self_attentions(model))
    seen = PADDED.bool()
    plain, padded = logits(model), logits(model, attention_mask=PADDED)[seen]
    cases = [
        (layers, NEAR),
        ([], AttentionWindow("sliding", 40)),
        ([], AttentionWindow("block", 8, 4)),
        (layers[:1], AttentionWindow("sliding", 64)),
    ]
    for full, span in cases:
        handle = masformer.convert(model, full_layers=full, span=span)
        close(logits(model), plain)
        close(logits(model, attention_mask=PADDED)[seen], padded)
        handle.revert()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("span", [NEAR, AttentionWindow("block", 8, 0), AttentionWindow("block", 4, 1)], ids=str)
@pytest.mark.parametrize("kind", [*STRANGE, *HYBRIDS])
def test_local_layers_are_the_models_own_attention_under_a_mask(kind, span):
    model = build(kind)
    layers = sorted(self_attentions(model))
    expected = masked(model, dict.fromkeys(layers[1:], span))
    assert not torch.allclose(expected, logits(model), atol=1e-3)
    masformer.convert(model, full_layers=layers[:1], span=span)
    close(logits(model), expected)


@pytest.mark.parametrize("kind", STRANGE)
def test_heads_of_both_kinds_in_a_layer(kind):
    """KV head 0 is full by name, or because its window holds everything: the two are computed in different ways."""
    model = build(kind)
    found = []
    for full in (None, AttentionWindow("sliding", 64)):
        handle = masformer.convert(model, full_layers=[], span=NEAR, heads={1: {0: full}, 2: {1: full}})
        found.append(logits(model))
        handle.revert()
    close(*found)


@pytest.mark.parametrize("kind", [*STRANGE, *HYBRIDS])
def test_pieces_on_either_cache_are_the_whole(kind):
    model = build(kind)
    full = sorted(self_attentions(model))[:1]
    masformer.convert(model, full_layers=full, span=NEAR)
    whole = logits(model)
    for cache in (DynamicCache(config=model.config), SpanCache(model.config)):
        torch.testing.assert_close(in_pieces(model, cache), whole, atol=5e-5, rtol=0)
    local = [index for index, layer in enumerate(cache.layers) if isinstance(layer, SpanLayer)]
    assert local == sorted(self_attentions(model))[1:]
    assert all(cache.layers[index].keys.shape[2] == 6 for index in local)
    report = cache.report()
    assert report["formula bytes"] == formula_bytes(model.config, 40, batch=2, itemsize=4)
    assert report["full bytes"] == 2 * 2 * 2 * 16 * 4 * 40
    assert ("state bytes" in report) == (kind in HYBRIDS)
    assert report["bytes"] == sum(report.get(f"{part} bytes", 0) for part in ("local", "full", "state"))


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "lfm2"])
def test_packed_full_layers(kind):
    model = build(kind)
    full = sorted(self_attentions(model))[:1]
    masformer.convert(model, full_layers=full, span=NEAR)
    cache = SpanCache(model.config, CacheConfig(bits=16, kernel="torch", buffer=8, variant="plain"))
    found = in_pieces(model, cache, 20)
    assert isinstance(cache.layers[full[0]], GearLayer)
    assert cache.layers[full[0]].packed_tokens >= 16
    torch.testing.assert_close(found, logits(model), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_scores_belong_to_the_layers_that_they_were_found_for(kind):
    model = build(kind)
    texts = repeated(some_ids()[0], 20, 20)
    scores = masformer.profile(model, texts, NEAR)
    assert list(scores) == sorted(self_attentions(model)) == [1, 3]
    heads = masformer.profile_heads(model, texts, NEAR)
    assert {layer: sum(row) for layer, row in heads.items()} == pytest.approx(scores, rel=1e-3, abs=1e-7)
    best = max(scores, key=lambda layer: scores[layer])
    assert masformer.choose_heads({layer: [score] for layer, score in scores.items()}, 1) == ((best,), {})
    assert masformer.place("bottom", 1, scores) == (1,)
    assert masformer.place("top", 1, scores) == (3,)
    handle = masformer.convert(model, full_layers=[best], span=NEAR)
    report = handle.report(10)
    assert (report["full layers"], report["local layers"]) == ([best], 1)
    assert report["pairs"] == pytest.approx((55 + NEAR.pairs(10)) / 110)


def test_layers_without_attention_cannot_be_named():
    model = build("lfm2")
    with pytest.raises(ConfigError, match=r"full_layers: 2; the model has attention in layers \[1, 3\]"):
        masformer.convert(model, full_layers=[2], span=NEAR)
    with pytest.raises(ConfigError, match=r"heads: 0; the model has attention in layers \[1, 3\]"):
        masformer.convert(model, full_layers=[1], span=NEAR, heads={0: {0: None}})


@pytest.mark.parametrize("kind", ["lfm2", "gemma2", "gpt_oss"])
def test_folders(tmp_path, kind):
    model = build(kind)
    plain = logits(model)
    masformer.convert(model, full_layers=[3], span=NEAR)
    again = open_model(save_model(model, tiny_tokenizer(), tmp_path / "own"), device="cpu").model
    assert torch.equal(logits(again), logits(model))
    native.restore(again).revert()
    assert torch.equal(logits(again), plain)


def test_generation_of_a_hybrid_on_its_small_cache():
    model = build("qwen3_next")
    masformer.convert(model, full_layers=[1], span=NEAR)
    keys = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": PADDED}
    expected = model.generate(input_ids=some_ids(), **keys)
    assert torch.equal(model.generate(input_ids=some_ids(), past_key_values=own_cache(model), **keys), expected)


def test_layers_with_keys_and_a_state_keep_their_own_cache():
    fields = {key: value for key, value in COMMON.items() if key != "head_dim"}
    config = AutoConfig.for_model("falcon_h1", **fields, **MAMBA, mamba_d_ssm=128, head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    masformer.convert(model, full_layers=[0], span=NEAR)
    with pytest.raises(ModelError, match="layer 0: transformers keeps a LinearAttentionAndFullAttentionLayer for it"):
        SpanCache(model.config)
    assert own_cache(model) is None
    found = in_pieces(model, DynamicCache(config=model.config))
    torch.testing.assert_close(found, logits(model), atol=5e-5, rtol=0)


def test_what_no_span_can_stand_for_is_refused_by_name():
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=NEAR)
    for name, layer in (("sliding_window", 1), ("indices", 0), ("position_bias", 0)):
        hook = self_attentions(model)[layer].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: (args, {**kwargs, name: torch.zeros(1)}), with_kwargs=True
        )
        with pytest.raises((ModelError, TypeError), match=f"layer {layer}: .* its attention {name}|multiple values"):
            logits(model)
        hook.remove()
    typed = tiny_model("llama", layer_types=["indexed_attention", "full_attention"]).model
    with pytest.raises(ModelError, match="llama: layer 0: transformers keeps a DynamicIndexedLayer for it"):
        masformer.convert(typed, full_layers=[1], span=NEAR)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "lfm2"])
def test_attentions_are_those_of_the_masked_model(kind, implementation):
    """Eager, converted, with ``output_attentions=True``: one ``[batch, heads, queries, keys]`` for each layer."""
    model = tiny_model(kind).model if kind in ("llama", "gpt2") else build(kind)
    if kind != "gemma2":  # which has no other
        model.set_attn_implementation(implementation)
    layers = sorted(self_attentions(model))
    heads = {layers[1]: {0: None}}
    masformer.convert(model, full_layers=layers[:1], span=NEAR, heads=heads)
    with torch.no_grad():
        output = model(input_ids=some_ids(), attention_mask=PADDED, output_attentions=True, use_cache=False)
    assert len(output.attentions) == len(layers)
    close(
        output.logits[PADDED.bool()],
        model(input_ids=some_ids(), attention_mask=PADDED, use_cache=False).logits[PADDED.bool()],
    )
    positions = (PADDED.cumsum(1) - 1).masked_fill(PADDED == 0, -1)
    for layer, weights in zip(layers, output.attentions, strict=True):
        count = kv_heads(model.config)
        table = spans.head_spans(model.config, layer)
        assert weights.shape == (2, 4, 40, 40)
        for head in range(4):
            span = table[head * count // 4]
            seen = span.sees(positions[:, :, None], positions[:, None]) & (positions >= 0)[:, None]
            found = weights[:, head]
            assert bool((found[seen] > 0).all())
            real = PADDED.bool()
            assert not found.masked_fill(seen, 0)[real].any()
            close(found.sum(-1)[real], torch.ones(int(real.sum())))


def test_attentions_on_a_small_cache_are_refused():
    model = tiny_model("llama").model
    masformer.convert(model, full_layers=[1], span=NEAR)
    with pytest.raises(ModelError, match="layer 0: the weights of its attention are asked for"), torch.no_grad():
        model(input_ids=some_ids(), past_key_values=SpanCache(model.config), output_attentions=True)
