"""The layer map names every matrix of every supported architecture, and targets mean what they say."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tenfold.errors import ConfigError, ModelError
from tenfold.models.layer_map import layer_map
from tenfold.models.tiny import tiny_model

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "t5", "deberta-v2"]
# PEFT 0.21 asks for a property that transformers 5.23 renamed (2026-07).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LLAMA_BLOCK = ["q", "k", "v", "o", "gate", "up", "down"]
BLOCKS = {
    **{kind: {"decoder": LLAMA_BLOCK} for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3")},
    "gpt2": {"decoder": ["qkv", "o", "fc1", "fc2"]},
    "t5": {
        "encoder": ["q", "k", "v", "o", "fc1", "fc2"],
        "decoder": ["q", "k", "v", "o", "cross_q", "cross_k", "cross_v", "cross_o", "fc1", "fc2"],
    },
    "deberta-v2": {"encoder": ["q", "k", "v", "o", "fc1", "fc2"]},
}


def matrices(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model(kind).model for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_has_a_slot_with_its_shape(models, kind):
    model = models[kind]
    slots = {slot.name: slot for slot in layer_map(model).slots}
    for name, module in matrices(model).items():
        slot = slots[name]
        weight = module.weight.T if slot.layout == "conv1d" else module.weight
        assert tuple(weight.shape) == (slot.out_features, slot.in_features)
        assert slot.layout == ("conv1d" if isinstance(module, Conv1D) else "linear")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_belongs_to_a_slot(models, kind):
    model = models[kind]
    names = {slot.name for slot in layer_map(model).slots}
    assert {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_roles_of_each_block(models, kind):
    found = layer_map(models[kind])
    for stack, roles in BLOCKS[kind].items():
        for layer in range(2):
            block = [s for s in found.slots if s.layer == layer and s.stack == stack]
            assert sorted(s.role for s in block if s.layout in ("linear", "conv1d")) == sorted(roles)
    outside = {slot.role for slot in found.slots if slot.layer is None}
    assert {"embed", "head", "norm"} <= outside


@pytest.mark.parametrize("kind", KINDS)
def test_numbers(models, kind):
    found = layer_map(models[kind])
    grouped = 2 if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3") else 4
    assert (found.layers, found.hidden, found.heads, found.kv_heads, found.head_dim) == (2, 64, 4, grouped, 16)
    assert found.encoder_layers == (2 if kind == "t5" else 0)


def test_grouped_query_shapes(models):
    slots = {slot.role: slot for slot in layer_map(models["llama"]).slots}
    assert (slots["q"].out_features, slots["k"].out_features, slots["v"].out_features) == (64, 32, 32)


def test_head_dim_that_is_not_hidden_over_heads():
    found = layer_map(tiny_model("qwen3", head_dim=32).model)
    assert found.head_dim == 32
    assert {slot.role: slot for slot in found.slots}["o"].in_features == 4 * 32


def test_fused_qkv_splits_as_the_model_does(models):
    model = models["gpt2"]
    slot = layer_map(model).select(["qkv"])[0]
    assert slot.split == (("q", 64), ("k", 64), ("v", 64))
    assert sum(size for _, size in slot.split) == slot.out_features


def test_phi3_is_fused_in_attention_and_mlp():
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    slots = {slot.role: slot for slot in layer_map(model).slots}
    assert slots["qkv"].split == (("q", 64), ("k", 32), ("v", 32))
    assert slots["gate_up"].split == (("gate", 96), ("up", 96))
    assert slots["gate_up"].out_features == 192


def test_gated_t5_has_gate_up_down():
    model = tiny_model("t5", feed_forward_proj="gated-gelu").model
    roles = {slot.role for slot in layer_map(model).slots}
    assert {"gate", "up", "down"} <= roles
    assert not {"fc1", "fc2"} & roles


def test_deberta_with_keys_of_its_own_for_positions():
    model = tiny_model("deberta-v2", share_att_key=False).model
    found = layer_map(model)
    assert {"pos_q", "pos_k"} <= {slot.role for slot in found.slots}
    assert len(found.select(["attention"])) == 2 * 6


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(models, kind):
    with torch.device("meta"):
        model = type(models[kind])(models[kind].config)
    assert layer_map(model) == layer_map(models[kind])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "deberta-v2"])
def test_peft_changes_no_name(kind):
    model = tiny_model(kind).model
    plain = layer_map(model)
    config = peft.LoraConfig(
        target_modules=[slot.name for slot in plain.select(["all-linear"])],
        fan_in_fan_out=kind == "gpt2",
        modules_to_save=["classifier"] if kind == "deberta-v2" else None,
    )
    assert layer_map(peft.get_peft_model(model, config)) == plain


def test_classification_and_reward_heads():
    for kind, task in (("llama", "reward"), ("gpt2", "reward"), ("deberta-v2", "reward"), ("t5", "classification")):
        roles = [slot.role for slot in layer_map(tiny_model(kind, task=task).model).slots]
        assert "head" in roles


def test_select_in_model_order_without_duplicates(models):
    found = layer_map(models["llama"])
    names = [slot.name for slot in found.select(["down", "q", "mlp", "q_proj"])]
    assert names == [slot.name for slot in found.slots if slot.role in ("q", "gate", "up", "down")]


def test_all_linear_is_attention_and_mlp_and_never_a_head(models):
    for kind in KINDS:
        found = layer_map(models[kind])
        everything = {slot.name for slot in found.select(["all-linear"])}
        heads = {slot.name for slot in found.slots if slot.role == "head"}
        assert everything == set(matrices(models[kind])) - heads
        assert everything == {slot.name for slot in found.select(["attention", "mlp"])}


def test_select_by_suffix_and_expression(models):
    found = layer_map(models["llama"])
    assert len(found.select(["mlp.down_proj"])) == 2
    assert [slot.layer for slot in found.select([r"model\.layers\.1\..*"])] == [1] * 7
    assert found.select(["model.layers.0.self_attn.q_proj"])[0].role == "q"
    assert [slot.role for slot in found.select(["head"])] == ["head"]


def test_suffix_stops_at_a_dot(models):
    with pytest.raises(ConfigError, match="matches nothing"):
        layer_map(models["llama"]).select(["proj"])


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("llama", "q_porj", "nearest: q_proj"),
        ("llama", "fc1", "roles here: q, k, v, o, gate, up, down"),
        ("gpt2", "q", "fused into 'qkv'"),
        ("llama", "embed", "matches nothing"),
        ("llama", "[", "matches nothing"),
    ],
)
def test_a_target_without_match_is_an_error_that_helps(models, kind, target, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        layer_map(models[kind]).select(["o", target])
    assert repr(target) in str(caught.value)


def test_targets_must_be_a_list_with_something_in_it(models):
    found = layer_map(models["llama"])
    with pytest.raises(ConfigError, match="not a list"):
        found.select("q")
    with pytest.raises(ConfigError, match="empty"):
        found.select([])


def causal(model_type, **fields):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**small, **fields}))


def test_a_model_without_blocks_lists_what_was_found():
    class Flat(PreTrainedModel):
        config_class = GPT2Config

        def __init__(self, config):
            super().__init__(config)
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def get_output_embeddings(self):
            return self.second

    found = layer_map(Flat(GPT2Config()))
    assert [slot.name for slot in found.select(["all-linear"])] == ["first"]
    flat = Flat(GPT2Config())
    del flat.first
    with pytest.raises(ModelError, match=r"gpt2: no linear layer in repeated blocks.*found 1 x second"):
        layer_map(flat)


def test_a_stranger_in_a_block_is_adapted_under_its_own_name():
    model = tiny_model("llama").model
    model.model.layers[1].extra = torch.nn.Linear(64, 64)
    found = layer_map(model)
    assert [slot.name for slot in found.select(["extra"])] == ["model.layers.1.extra"]
    assert found.select(["extra"])[0] in found.select(["all-linear"])
    assert not {slot.role for slot in found.select(["attention", "mlp"])} - {*LLAMA_BLOCK}
