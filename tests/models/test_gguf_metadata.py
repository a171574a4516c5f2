"""What a GGUF file says beside its weights decides the logits as transformers computes them, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold.errors import ModelError
from tenfold.models.gguf import load_gguf
from tenfold.models.gguf_metadata import Header, carry_over
from tenfold.models.tiny import tiny_tokenizer

VOCABULARY = 263
IDS = torch.randint(6, 260, (1, 200), generator=torch.Generator().manual_seed(1))
ROPE = {"rope_theta": 10000.0}


def llama(hidden: int = 64, **fields) -> LlamaForCausalLM:
    """A model whose attention is sharp enough that a wrong angle shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2:
            parameter *= 6
        elif "bias" in fields:
            parameter.normal_()
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in the order that llama.cpp's converter stores them in."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM, say=lambda writer: None, tensors=(), packed=None, pre=None) -> Path:
    """The model as a GGUF file.

    Args:
        say: writes more metadata.
        tensors: more tensors, by name.
        packed: GGUF name -> type and bytes that take the place of the values.
        pre: how text is split, ``tokenizer.ggml.pre``.
    """
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    say(writer)
    tokenizer = tiny_tokenizer("llama")
    tokens, special = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, "12" if pre else "ab"])
    writer.add_token_types([3 if token in special else 1 for token in tokens] + [1])
    writer.add_token_merges(["1 2" if pre else "a b"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_unk_token_id, 3)):
        add(token)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values, stored = weight.numpy().copy(), names.get_name(name, (".weight", ".bias"))
        for role, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            values = interleaved(values, heads) if f".{role}." in name else values
        kind, raw = (packed or {}).get(stored, (None, np.ascontiguousarray(values)))
        writer.add_tensor(stored, raw, raw_dtype=kind)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def error(path: Path, expected: LlamaForCausalLM) -> float:
    opened, _ = load_gguf(path)
    with torch.no_grad():
        return float((opened(IDS).logits - expected(IDS).logits).abs().max())


def linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def linear_of_old(writer):
    writer.add_float32("llama.rope.scale_linear", 4.0)


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def yarn_with_factors(writer):
    yarn(writer)
    writer.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)
    writer.add_float32("llama.rope.scaling.attn_factor", 1.25)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("say", "rope"),
    [
        (lambda writer: None, {"rope_type": "default"}),
        (linear, {"rope_type": "linear", "factor": 4.0}),
        (linear_of_old, {"rope_type": "linear", "factor": 4.0}),
        (yarn, YARN),
        # ggml multiplies attn_factor by YaRN's own 0.1 ln(factor) + 1
        (yarn_with_factors, {**YARN, "beta_fast": 16.0, "attention_factor": 1.25 * (0.1 * np.log(4.0) + 1)}),
    ],
)
def test_rotary_scaling_of_the_metadata(tmp_path, say, rope):
    model = llama(rope_parameters={**ROPE, **rope})
    assert error(write(tmp_path / "m.gguf", model, say), model) < 1e-5
    if rope["rope_type"] != "default":
        assert error(tmp_path / "m.gguf", llama(rope_parameters={**ROPE, "rope_type": "default"})) > 1.0


@pytest.mark.parametrize("length", [64, 8192])
def test_rotary_divisors_of_llama_3(tmp_path, length):
    """The file holds only the divisors; for the published length they are recognised and the usual field comes out."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = llama(
        rope_parameters={**ROPE, **scaling, "rope_type": "llama3", "original_max_position_embeddings": length}
    )
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert error(path, model) < 1e-4
    found = load_gguf(path)[0].config.rope_parameters
    assert found["rope_type"] == ("llama3" if length == 8192 else "longrope")
    if length == 8192:
        assert (found["factor"], found["original_max_position_embeddings"]) == (8.0, 8192)


def test_longrope_has_two_lists_of_divisors(tmp_path):
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(1, 4, 8, dtype=np.float32)
    rope = {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": 128,
        "factor": 4.0,
        "attention_factor": 1.1,
    }

    def say(writer):
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_float32("llama.rope.scaling.attn_factor", 1.1)

    model = llama(rope_parameters={**ROPE, **rope})
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    assert error(write(tmp_path / "m.gguf", model, say, tensors), model) < 1e-5


def test_how_much_of_a_head_turns():
    from transformers import NemotronConfig

    config = NemotronConfig(head_dim=32)
    carry_over(config, Header("nemotron", {"rope.dimension_count": 8}, {}, {}, ()), "m.gguf")
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    with pytest.raises(ModelError, match="8 of the 16 dimensions of a head turn, which LlamaConfig cannot"):
        carry_over(llama().config, Header("llama", {"rope.dimension_count": 8}, {}, {}, ()), "m.gguf")


def test_biases_of_attention_and_mlp_are_used(tmp_path):
    model = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    assert error(write(tmp_path / "m.gguf", model), model) < 1e-5


@pytest.mark.parametrize(
    ("say", "named"),
    [
        (lambda writer: writer.add_float32("llama.attention.scale", 0.5), r"llama\.attention\.scale = 0\.5"),
        (lambda writer: writer.add_float32("llama.logit_scale", 0.1), r"llama\.logit_scale = 0\.1"),
        (lambda writer: writer.add_float32("llama.attn_logit_softcapping", 50.0), "attn_logit_softcapping = 50"),
        (lambda writer: writer.add_uint32("llama.expert_count", 8), "expert_count = 8"),
        (lambda writer: writer.add_uint32("llama.attention.value_length", 8), "value_length = 8"),
        (lambda writer: writer.add_uint32("llama.novelty", 3), "novelty = 3"),
        (lambda writer: writer.add_bool("llama.expert_weights_norm", True), "expert_weights_norm = True"),
        (lambda writer: writer.add_bool("llama.attention.causal", False), "attention.causal = False"),
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path, say, named):
    with pytest.raises(ModelError, match=named):
        load_gguf(write(tmp_path / "m.gguf", llama(), say))


@pytest.mark.parametrize(
    "say",
    [
        lambda writer: writer.add_float32("llama.attention.scale", 0.25),  # of heads of 16: what is used anyway
        lambda writer: writer.add_float32("llama.logit_scale", 1.0),
        lambda writer: writer.add_uint32("llama.expert_count", 0),
        lambda writer: writer.add_uint32("llama.attention.value_length", 16),
        lambda writer: writer.add_float32("llama.attn_logit_softcapping", 0.0),
        lambda writer: writer.add_bool("llama.expert_weights_norm", False),
        lambda writer: writer.add_bool("llama.attention.causal", True),
    ],
)
def test_what_changes_nothing_is_no_obstacle(tmp_path, say):
    model = llama()
    assert error(write(tmp_path / "m.gguf", model, say), model) < 1e-5


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    tensors = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    with pytest.raises(ModelError, match=r"blk\.0\.attn_sinks\.weight"):
        load_gguf(write(tmp_path / "m.gguf", llama(), tensors=tensors))


def test_gemmas_scales_windows_and_caps_are_carried():
    from transformers import Gemma2Config, Gemma3TextConfig

    keys = {
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attn_logit_softcapping": 40.0,
        "final_logit_softcapping": 20.0,
    }
    config = Gemma2Config(num_hidden_layers=2, head_dim=32)
    carry_over(config, Header("gemma2", keys, {}, {}, ()), "m.gguf")
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (40.0, 20.0)
    assert config.query_pre_attn_scalar == 32
    large = Gemma2Config(num_hidden_layers=46, hidden_size=4608, num_attention_heads=32, head_dim=128)
    carry_over(large, Header("gemma2", keys | {"attention.key_length": 128, "attention.value_length": 128}, {}, {}, ()),
               "m.gguf")  # fmt: skip
    assert large.query_pre_attn_scalar == 144  # as Gemma 2 27B was published

    config = Gemma3TextConfig(num_hidden_layers=4, head_dim=32)
    keys = {
        "attention.key_length": 32,
        "attention.sliding_window_pattern": 2,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.freq_base_swa": 5000.0,
    }
    carry_over(config, Header("gemma3", keys, {}, {}, ()), "m.gguf")
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 5000.0


# where the half-precision scales of a block lie; the rest of a block may be any bytes
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ3_XXS": (0,),
    "IQ2_XXS": (0,),
    "IQ2_S": (0,),
    "BF16": (),
}


@pytest.mark.parametrize("name", list(SCALES))
def test_packed_types_give_the_logits_of_the_dequantised_tensors(tmp_path, name):
    kind, model, packed = gguf.GGMLQuantizationType[name], llama(hidden=256), {}
    size, width = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(0)
    for layer in range(2):
        for role, place in (("up_proj", "ffn_up"), ("down_proj", "ffn_down"), ("gate_proj", "ffn_gate")):
            if name == "BF16":
                raw = (draw.standard_normal((256, 256)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                blocks = raw.view(np.uint8).reshape(256, -1)
            else:
                blocks = draw.integers(0, 256, (256, 256 // size, width), dtype=np.uint8)
                for place_of_scale in SCALES[name]:
                    scale = (draw.standard_normal((256, 256 // size, 1)) * 0.01).astype(np.float16)
                    blocks[..., place_of_scale : place_of_scale + 2] = scale.view(np.uint8)
                blocks = blocks.reshape(256, -1)
            packed[f"blk.{layer}.{place}.weight"] = (kind, blocks)
            values = torch.from_numpy(gguf.dequantize(blocks, kind).astype(np.float32).reshape(256, 256))
            model.get_submodule(f"model.layers.{layer}.mlp.{role}").weight.data.copy_(values)
    assert error(write(tmp_path / "m.gguf", model, packed=packed), model) < 1e-4


def test_digits_are_cut_off_where_the_file_says_so(tmp_path):
    """A merge of two digits exists; splitting before merging must keep them apart, as llama.cpp does."""
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        _, tokenizer = load_gguf(write(tmp_path / f"{pre}.gguf", llama(), pre=pre))
        pieces[pre] = tokenizer.tokenize("12")
    assert pieces == {"smollm": ["1", "2"], "gpt-2": ["12"]}


def test_an_answer_ends_at_the_end_of_a_turn(tmp_path):
    model, tokenizer = load_gguf(write(tmp_path / "m.gguf", llama(), lambda w: w.add_eot_token_id(5)))
    assert model.generation_config.eos_token_id == [2, 5]
    assert tokenizer.eos_token_id == 2
