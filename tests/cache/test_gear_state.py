"""What a packed cache is after refusals, copies, crops and assisted decoding; and what padding does to it."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tenfold import gear
from tenfold.errors import ModelError
from tenfold.models.memory import stored_bytes
from tenfold.models.tiny import tiny_model

# Compiling takes seconds for each width; that all kernels agree is tested beside them.
TORCH = {"kernel": "torch", "buffer": 16}


def ids_of(tokens, batch=1, seed=0):
    return torch.randint(10, 200, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def heads(tokens, batch=1, seed=0):
    return torch.randn(2, batch, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def stored(layer):
    """Everything that a layer holds, by name."""
    parts = {f"first {n}": x for n, x in enumerate(layer.first)} | {
        f"buffer {n}": x for n, x in enumerate(layer.buffer)
    }
    for number, pair in enumerate(layer.packed):
        for side, name in zip(pair, ("keys", "values"), strict=True):
            parts |= {f"{name} {number} {part}": tensor for part, tensor in side.tensors().items()}
    return parts


def check_same(found, expected):
    for layer, reference in zip(found.packed_layers, expected.packed_layers, strict=True):
        mine, its = stored(layer), stored(reference)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in its)
        assert layer.get_seq_length() == reference.get_seq_length()


def continued(opened, cache, ids, tokens, **keys):
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None, **keys
    )
    return opened.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, generation_config=config
    )


def test_after_assisted_decoding_plain_decoding_packs_on():
    opened = tiny_model("llama")
    ids = opened.tokenizer("one two three one two three one two three one two three", return_tensors="pt").input_ids
    with gear.attach(opened.model, bits=4, **TORCH) as cache:
        ids = continued(opened, cache, ids, 40, prompt_lookup_num_tokens=5)
        ids = continued(opened, cache, ids, 200)
        report = cache.report()
    assert report["tokens"] == 294
    assert report["packed tokens"] == 288  # 4 first tokens, 18 blocks, 2 in the buffer


def test_while_recorded_what_a_crop_may_take_back_is_not_packed():
    """A draft of single tokens, taken back at once: no trace, as long as it is no longer than a block."""
    config = tiny_model("llama").model.config
    k, v = heads(100)
    guess, _ = heads(16, seed=1)
    straight, verified = (gear.GearCache(config, bits=2, variant="gear", **TORCH) for _ in range(2))
    verified.activate_past_recording()
    for start in range(0, 100, 5):
        part = slice(start, start + 5)
        straight.update(k[:, :, part], v[:, :, part], 0)
        verified.update(k[:, :, part], v[:, :, part], 0)
        verified.layers[0].crop(0)
        for token in guess.split(1, 2):
            verified.update(token, token, 0)
        verified.layers[0].crop(-16)
    check_same(verified, straight)
    assert straight.layers[0].packed_tokens == 96


@pytest.mark.parametrize("prefill", ["tail", "compress", "blocks"])
def test_a_first_call_that_is_taken_back_in_part_was_shorter(prefill):
    """Its length decides what is packed as the prompt, with the prompt's rank."""
    config = tiny_model("llama").model.config
    keys = {"bits": 4, "variant": "gear", "prefill_rank": 4, "rank": 1, "prefill": prefill, **TORCH}
    k, v = heads(90)
    straight, cropped = gear.GearCache(config, **keys), gear.GearCache(config, **keys)
    straight.update(k[:, :, :10], v[:, :, :10], 0)
    cropped.activate_past_recording()
    cropped.update(k[:, :, :50], v[:, :, :50], 0)
    cropped.layers[0].crop(-40)
    for token in range(10, 90):
        for cache in (straight, cropped):
            cache.update(k[:, :, token : token + 1], v[:, :, token : token + 1], 0)
            cache.layers[0].crop(0)
    check_same(cropped, straight)


def spoiled(opened, layer):
    """A hook by which the values of one layer hold a NaN."""

    def spoil(module, args, output):
        output = output.clone()
        output[0, 9, 2] = torch.nan  # behind the exact first tokens
        return output

    return opened.model.model.layers[layer].self_attn.v_proj.register_forward_hook(spoil)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("before", [0, 30])
@torch.no_grad()
def test_a_call_that_is_refused_leaves_every_layer_as_it_was(before, layer, bare):
    opened = tiny_model("llama", num_hidden_layers=3)
    with gear.attach(opened.model, bits=4, **TORCH) as attached:
        cache, reference = (gear.GearCache(opened.model.config, bits=4, **TORCH) for _ in range(2))
        for each in (cache, reference):
            if bare:
                for part in each.packed_layers:
                    part.reads = lambda: False
            if before:
                opened.model(input_ids=ids_of(before), past_key_values=each)
        hook = spoiled(opened, layer)
        with pytest.raises(ModelError, match=f"layer {layer}: values are not finite"):
            opened.model(input_ids=ids_of(40, seed=1), past_key_values=cache)
        hook.remove()
        assert [part.get_seq_length() for part in cache.layers] == [before] * 3
        if before:
            check_same(cache, reference)
        found = opened.model(input_ids=ids_of(25, seed=2), past_key_values=cache).logits
        expected = opened.model(input_ids=ids_of(25, seed=2), past_key_values=reference).logits
    assert torch.equal(found, expected)
    check_same(cache, reference)
    # Nothing of the call is kept once it is over, but the tensors themselves.
    held = [(part.first, part.buffer, part.packed, part.rotation) for part in cache.packed_layers]
    assert stored_bytes(cache) == stored_bytes(held)
    assert attached.get_seq_length() == 0


@torch.no_grad()
def test_a_refused_first_call_says_nothing_of_the_batch():
    opened = tiny_model("llama")
    with gear.attach(opened.model, bits=4, **TORCH) as cache:
        hook = spoiled(opened, 0)
        with pytest.raises(ModelError, match="not finite"):
            opened.model(input_ids=ids_of(40), past_key_values=cache)
        hook.remove()
        opened.model(input_ids=ids_of(40, batch=3), past_key_values=cache)
    assert cache.report()["packed tokens"] == 32


@torch.no_grad()
def test_sliding_layers_are_taken_back_too():
    opened = tiny_model("gemma3")
    before = ids_of(45)
    with gear.attach(opened.model, bits=4, **TORCH) as cache:
        opened.model(input_ids=before, past_key_values=cache)
        window = cache.layers[0].keys.clone()
        hook = spoiled(opened, 1)
        with pytest.raises(ModelError, match="layer 1: values"):
            opened.model(input_ids=ids_of(40, seed=1), past_key_values=cache)
        hook.remove()
        assert [layer.get_seq_length() for layer in cache.layers] == [45, 45]
        assert torch.equal(cache.layers[0].keys, window)


@torch.no_grad()
def test_recurrent_states_cannot_be_put_back_and_that_is_said():
    config = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = Lfm2ForCausalLM(Lfm2Config(**fields, num_attention_heads=4, num_key_value_heads=2, **config)).eval()

    def spoil(module, args, output):
        return output * torch.nan

    with gear.attach(model, bits=4, **TORCH) as cache:
        for before in (0, 20):
            if before:
                model(input_ids=ids_of(before), past_key_values=cache)
            hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(spoil)
            with pytest.raises(ModelError, match="not finite"):
                model(input_ids=ids_of(40), past_key_values=cache)
            hook.remove()
            assert cache.layers[1].get_seq_length() == before
        with pytest.raises(ModelError, match="recurrent states"):
            model(input_ids=ids_of(1), past_key_values=cache)
        cache.reset()
        found = model(input_ids=ids_of(40), past_key_values=cache).logits
    torch.testing.assert_close(found, model(input_ids=ids_of(40), use_cache=False).logits, atol=1e-5, rtol=0)


def test_a_crop_whose_packing_is_refused_crops_every_layer():
    cache = gear.GearCache(tiny_model("llama").model.config, bits=4, sinks=0, **TORCH)
    cache.activate_past_recording()
    bad = heads(40)
    bad[0, 0, 1, 3, 5] = torch.nan
    cache.update(*bad, 0)
    cache.update(*heads(40), 1)
    with pytest.raises(ModelError, match="layer 0: keys are not finite"):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [35, 35]


def saved_and_loaded(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.load"])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("used_inside", [False, True])
@torch.no_grad()
def test_a_copy_reads_where_the_original_would(copied, made_inside, used_inside):
    opened = tiny_model("llama")
    cache = gear.GearCache(opened.model.config, bits=4, **TORCH)
    if made_inside:
        with gear.attach(opened.model, bits=4):
            opened.model(input_ids=ids_of(60), past_key_values=cache)
            other = copied(cache)
    else:
        opened.model(input_ids=ids_of(60), past_key_values=cache)
        other = copied(cache)
    if used_inside:
        with gear.attach(opened.model, bits=4):
            found, expected = (step(opened, each) for each in (other, cache))
    else:
        found, expected = (step(opened, each) for each in (other, cache))
    assert found["reads"] == expected["reads"] == ("views" if used_inside else "tensors")
    assert torch.equal(found["logits"], expected["logits"])
    check_same(other, cache)


def step(opened, cache):
    logits = opened.model(input_ids=ids_of(3, seed=4), past_key_values=cache).logits
    return {"logits": logits, "reads": cache.report()["reads"]}


@torch.no_grad()
def test_a_cache_from_a_file_in_another_process(tmp_path):
    opened = tiny_model("llama")
    with gear.attach(opened.model, bits=4, **TORCH) as cache:
        opened.model(input_ids=ids_of(60), past_key_values=cache)
        torch.save(cache, tmp_path / "cache.pt")
        expected = opened.model(input_ids=ids_of(3), past_key_values=cache).logits
    torch.save((ids_of(3), expected), tmp_path / "expected.pt")
    code = """
import sys, torch
from tenfold import gear
from tenfold.models.tiny import tiny_model
opened = tiny_model("llama")
ids, expected = torch.load(sys.argv[1] + "/expected.pt")
torch.set_grad_enabled(False)
for inside in (True, False):
    cache = torch.load(sys.argv[1] + "/cache.pt", weights_only=False)
    if inside:
        with gear.attach(tiny_model("llama", num_hidden_layers=3).model), gear.attach(opened.model):
            found = opened.model(input_ids=ids, past_key_values=cache).logits
            print(cache.report()["reads"], torch.equal(found, expected))
    else:
        found = opened.model(input_ids=ids, past_key_values=cache).logits
        print(cache.report()["reads"], bool((found - expected).abs().max() < 1e-3))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["views", "True", "tensors", "True"]


def test_a_copy_that_is_loaded_chooses_its_kernel_anew():
    cache = gear.GearCache(tiny_model("llama").model.config, bits=4, **TORCH)
    cache.update(*heads(40), 0)
    assert "functions" not in cache.layers[0].__getstate__()
    assert saved_and_loaded(cache).layers[0].functions.name == "torch"


@pytest.mark.parametrize("mode", ["store", "simulate"])
@pytest.mark.parametrize("keys", [{"bits": 4}, {"bits": 2}, {"bits": 4, "variant": "gear"}, {"key_bits": 16}], ids=str)
def test_heads_near_the_end_of_float16_stay_finite(keys, mode):
    config = tiny_model("llama").model.config
    cache = gear.GearCache(config, mode=mode, **keys, **TORCH)
    signs = torch.randint(0, 2, (2, 1, 2, 60, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1
    k, v = (60000 * signs).half()
    cache.update(k, v, 0)
    found = cache.update(k[:, :, :1], v[:, :, :1], 0)
    exact = gear.GearCache(config, mode=mode, **keys, **TORCH)
    exact.update(k.float(), v.float(), 0)
    wide = exact.update(k[:, :, :1].float(), v[:, :, :1].float(), 0)
    for side, reference in zip(found, wide, strict=True):
        assert bool(side.isfinite().all())
        torch.testing.assert_close(side, reference.clamp(-65504, 65504).half(), atol=64, rtol=0)


@pytest.mark.parametrize("queries", [1, 40])
def test_outputs_of_float16_heads_are_clamped(queries):
    from tenfold.kernels.view import attend

    cache = gear.GearCache(tiny_model("llama").model.config, bits=2, sinks=0, **TORCH)
    x = torch.full((1, 2, 64, 16), 65000.0).half()
    x[:, :, :, ::3] = -65000
    cache.update(torch.zeros_like(x), x, 0)
    cache.layers[0].reads = lambda: True
    handle, _ = cache.update(torch.zeros_like(x[:, :, :queries]), x[:, :, :queries], 0)
    found = attend(torch.zeros(1, 4, queries, 16).half(), handle.view, None, 1.0)
    assert found.dtype == torch.float16
    assert bool(found.isfinite().all())


def test_threads_stay_what_they_are():
    """In a process of its own: numba's pool starts once, and would raise OpenMP's number to its own."""
    pytest.importorskip("numba")
    code = """
import torch
torch.set_num_threads(1)
from tenfold import gear
from tenfold.models.tiny import tiny_model
opened = tiny_model("llama")
with torch.no_grad(), gear.attach(opened.model, bits=8, buffer=16) as cache:
    opened.model(input_ids=torch.arange(10, 60)[None], past_key_values=cache)
    opened.model(input_ids=torch.tensor([[10]]), past_key_values=cache)
import numba
print(cache.report()["kernel"], torch.get_num_threads(), numba.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["numba", "1", "1"]


def padded(opened):
    opened.tokenizer.padding_side = "left"
    long, short = "a first text that is to be continued, of some length", "and another text that is shorter"
    both = opened.tokenizer([long, short], return_tensors="pt", padding=True)
    return both, int((both["attention_mask"][1] == 0).sum())


@torch.no_grad()
def test_a_bare_cache_that_is_told_the_mask_packs_padding_apart():
    """At 2 bits: what stands in the padding changes nothing, and the packed form is that of `attach`."""
    opened = tiny_model("llama")
    inputs, padding = padded(opened)
    keys = {"bits": 2, "variant": "plain", "prefill": "compress", **TORCH}
    caches = []
    for fill, told in ((0, True), (77, True), (77, False)):
        ids = inputs["input_ids"].clone()
        ids[1, :padding] = fill
        cache = gear.GearCache(opened.model.config, **keys)
        if told:
            cache.mask_padding(inputs["attention_mask"])
        caches.append(cache)
        opened.model(**{**inputs, "input_ids": ids}, past_key_values=cache)
    with gear.attach(opened.model, **keys) as cache:
        opened.model(**inputs, past_key_values=cache)
    first, second, untold = caches
    for number in (0, 1):
        scale = first.layers[number].packed[0][0].scale
        for other in (second, cache):
            torch.testing.assert_close(other.layers[number].packed[0][0].scale, scale, atol=1e-3, rtol=0)
    scales = [each.layers[0].packed[0][0].scale for each in (untold, first)]
    assert float((scales[0] - scales[1]).abs().max()) > 0.01
    with pytest.raises(ModelError, match="rows, tokens"):
        first.mask_padding(torch.ones(2, 1, 5, 5))


@torch.no_grad()
def test_the_mask_follows_the_rows():
    opened = tiny_model("llama")
    inputs, _ = padded(opened)
    mask = inputs["attention_mask"]
    layer = gear.GearCache(opened.model.config, bits=2, **{**TORCH, "buffer": 64})
    layer.mask_padding(mask)
    opened.model(**inputs, past_key_values=layer)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0]))
    layer.crop(-2)
    assert torch.equal(layer.layers[0].visible, mask[[1, 0], :-2].bool())
    layer.mask_padding(torch.ones(3, 4))
    with pytest.raises(ModelError, match="a mask of 3 rows for a cache of 2"):
        layer.update(*heads(64, batch=2), 0)
    layer.reset()
    assert layer.layers[0].visible is None


@torch.no_grad()
def test_padding_is_known_when_a_crop_packs():
    """Assisted decoding packs at `crop`, which is told no mask."""
    opened = tiny_model("llama")
    ids = torch.cat([torch.full((1, 20), 5), ids_of(40)], 1)
    mask = (torch.arange(60) >= 20).long()[None]
    packed = []
    for recorded in (True, False):
        with gear.attach(opened.model, bits=2, variant="plain", prefill="compress", **TORCH) as cache:
            if recorded:
                cache.activate_past_recording()
            opened.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            cache.crop(0)
        packed.append(cache)
    check_same(*packed)


def test_beams_over_a_cache_that_is_told_the_mask():
    opened = tiny_model("llama")
    inputs, _ = padded(opened)
    config = GenerationConfig(max_new_tokens=20, num_beams=3, do_sample=False, pad_token_id=0)
    cache = gear.GearCache(opened.model.config, bits=8, variant="plain", **TORCH)
    cache.mask_padding(inputs["attention_mask"])
    found = opened.model.generate(**inputs, past_key_values=cache, generation_config=config)
    exact = DynamicCache(config=opened.model.config)
    assert torch.equal(found, opened.model.generate(**inputs, past_key_values=exact, generation_config=config))
