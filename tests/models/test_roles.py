"""Roles that are found by structure: hand-written expectations for the families, and PEFT's own choice of layers."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tenfold.adapt import adalora
from tenfold.config.adalora import AdaLoraConfig
from tenfold.errors import ConfigError
from tenfold.models.layer_map import layer_map
from tenfold.models.roles import reads_weight
from tenfold.models.tiny import tiny_model
from tests.architectures import TABLE, configuration, stock

ROWS = {row.model_type: row for row in TABLE}


def named(path, *roles, o=None):
    """Modules called ``ROLE_proj``, and the output where it has another name."""
    found = {f"{path}.{role}_proj": role for role in roles}
    return found if o is None else {**found, f"{path}.{o}": "o"}


def neox(path):
    fused = {f"{path}.query_key_value": "qkv", f"{path}.dense": "o"}
    return {**fused, "mlp.dense_h_to_4h": "fc1", "mlp.dense_4h_to_h": "fc2"}


ATTENTION = named("self_attn", *"qkvo")
GATED = ("gate", "up", "down")
LLAMA = {**ATTENTION, **named("mlp", *GATED)}
GPT2 = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
GPTJ = {"mlp.fc_in": "fc1", "mlp.fc_out": "fc2"}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo", "olmo2", "cohere", "cohere2")
LIKE_LLAMA += ("granite", "stablelm", "smollm3", "exaone4", "internlm3")
EXPECTED = {
    **dict.fromkeys(LIKE_LLAMA, LLAMA),
    "nemotron": {**ATTENTION, **named("mlp", "up", "down")},
    "phi": {**named("self_attn", *"qkv", o="dense"), "mlp.fc1": "fc1", "mlp.fc2": "fc2"},
    "phi3": {**named("self_attn", "qkv", "o"), **named("mlp", "gate_up", "down")},
    "glm4": {**ATTENTION, **named("mlp", "gate_up", "down")},
    "opt": {**named("self_attn", *"qkv", o="out_proj"), "fc1": "fc1", "fc2": "fc2"},
    "bloom": neox("self_attention"),
    "falcon": neox("self_attention"),
    "gpt_neox": neox("attention"),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**named("attn", *"qkv", o="out_proj"), **GPTJ},
    "codegen": {**named("attn", "qkv", o="out_proj"), **GPTJ},
    "starcoder2": {**ATTENTION, "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"},
    "mpt": {"attn.Wqkv": "qkv", "attn.out_proj": "o", **named("ffn", "up", "down")},
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe"), ATTENTION),
    "deepseek_v3": {
        **{f"self_attn.{name}": name for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")},
        **named("self_attn", "o"),
    },
    **{key: {"mixer.in_proj": "in_proj"} for key in ("mamba", "falcon_mamba", "mamba2")},
    "qwen3_next": {
        **{f"linear_attn.{name}": name for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")},
        **ATTENTION,
    },
    "lfm2": {
        "conv.in_proj": "in_proj",
        "conv.out_proj": "out_proj",
        **named("self_attn", *"qkv", o="out_proj"),
        "feed_forward.w1": "gate",
        "feed_forward.w3": "up",
        "feed_forward.w2": "down",
    },
    "falcon_h1": {"mamba.in_proj": "in_proj", **ATTENTION, **named("feed_forward", *GATED)},
    "granitemoehybrid": {
        "mamba.in_proj": "in_proj",
        **ATTENTION,
        "shared_mlp.input_linear": "gate_up",
        "shared_mlp.output_linear": "down",
    },
}


def on_meta(model_type):
    with torch.device("meta"):
        return stock(model_type).from_config(configuration(ROWS[model_type]))


@pytest.mark.parametrize("model_type", EXPECTED)
def test_roles_of_a_family(model_type):
    found = layer_map(on_meta(model_type))
    chosen = [slot for slot in found.select(["all-linear"]) if slot.layer is not None]
    assert {slot.name.split(f".{slot.layer}.", 1)[1]: slot.role for slot in chosen} == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", ROWS)
def test_all_linear_is_that_of_peft(model_type):
    """But for routers, for what an adapter could not reach or leave, and for what reads pictures."""
    model = on_meta(model_type)
    found = layer_map(model)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.tuners.tuners_utils._maybe_include_all_linear_layers(config, model).target_modules
    if ROWS[model_type].kind == "pictures":
        theirs = {name for name in theirs if {"language_model", "text_model"} & {*name.split(".")}}
    ours = {slot.name for slot in found.select(["all-linear"])}
    aside = {slot.name for slot in found.slots if slot.fixed or slot.part == "router"}
    assert ours == theirs - aside
    size = sum(slot.in_features + slot.out_features for slot in found.select(["all-linear"]))
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    assert size == sum(sum(matrices[name].weight.shape) for name in ours)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mixtral", "stacked experts stay as they are: model.layers.*.mlp.experts.gate_up_proj, "),
        ("qwen3_next", "routers stay as they are: model.layers.*.mlp.shared_expert_gate"),
        ("mamba", "mixer.dt_proj, backbone.layers.*.mixer.out_proj: the model reads the weight without calling"),
        ("zamba2", "several layers share the weight"),
    ],
)
def test_what_is_left_out_is_said(model_type, said):
    found = layer_map(on_meta(model_type))
    assert said in " | ".join(found.left_out(["all-linear"]))
    assert found.left_out(["in_proj"]) == ()


def test_stacked_experts_are_counted():
    model = on_meta("mixtral")
    numbers = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert f"of {numbers:,} numbers" in layer_map(model).left_out(["mlp", "attention"])[0]


@pytest.mark.parametrize(
    ("model_type", "target", "said"),
    [
        ("mamba", "out_proj", "reads the weight without calling the layer"),
        ("mixtral", "mlp.experts.down_proj", "not a linear layer in this mixtral model"),
        ("bloom", "k", "'k' is fused into 'qkv'"),
        ("gpt_bigcode", "v", "'v' is fused into 'qkv'"),
        ("zamba2", r".*shared_transformer\.self_attn\.q_proj", "share the weight"),
        ("mixtral", "mlp", "matches nothing in this mixtral model"),
        (
            "qwen3_moe",
            "gate_proj",
            "stacked in parameters, which no target reaches: model.layers.*.mlp.experts.gate_up_proj",
        ),
        ("deepseek_v3", r".*shared_experts.*", "PEFT takes the name for the stacked experts"),
    ],
)
def test_targets_that_cannot_be_are_refused_by_name(model_type, target, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        layer_map(on_meta(model_type)).select([target])


@pytest.mark.parametrize(
    ("model_type", "target", "count"),
    [
        ("bloom", "dense", 2),
        ("mamba", "mixer", 2),
        ("qwen3_next", "o_proj", 1),
        ("qwen3_next", "shared_expert_gate", 2),
        ("opt", "project_in", 1),
        ("lfm2", "q", 1),
    ],
)
def test_modules_suffixes_and_expressions_as_in_peft(model_type, target, count):
    assert len(layer_map(on_meta(model_type)).select([target])) == count


def test_heads_of_keys_follow_from_the_size_of_a_fused_matrix():
    """StarCoder has one head of keys under several names of a configuration, or none."""
    slot = layer_map(on_meta("gpt_bigcode")).select(["qkv"])[0]
    assert slot.split == (("q", 32), ("k", 8), ("v", 8))


class Experts(torch.nn.Module):
    """A mixture of linear layers, as models with code of their own bring it."""

    def __init__(self, hidden, inner, count):
        super().__init__()
        self.gate = torch.nn.Linear(hidden, count, bias=False)
        names, shapes = ("w1", "w2", "w3"), ((hidden, inner), (inner, hidden), (hidden, inner))
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(*shape) for name, shape in zip(names, shapes, strict=True)})
            for _ in range(count)
        )


def test_experts_that_are_linear_layers_are_adapted():
    model = tiny_model("llama").model
    for layer in model.model.layers:
        layer.mlp = Experts(64, 96, 3)
    found = layer_map(model)
    assert [slot.role for slot in found.select(["mlp"]) if slot.layer == 0] == ["gate", "down", "up"] * 3
    assert found.left_out(["all-linear"]) == ("routers stay as they are: model.layers.*.mlp.gate",)
    assert len(found.select(["all-linear"])) == 2 * (4 + 9)


def test_a_weight_that_is_read_or_only_looked_at():
    class Reads(torch.nn.Module):
        def forward(self, x):
            return x @ self.kernel.weight + self.called(x)

        def other(self, x):
            return x.to(self.called.weight.dtype) if isinstance(self.called.weight, torch.Tensor) else x

    assert reads_weight(Reads, "kernel")
    assert not reads_weight(Reads, "called")
    assert not reads_weight(Reads, "absent")


def test_the_rank_map_tells_matrices_of_one_role_apart():
    model = tiny_model("llama").model
    for layer in model.model.layers:
        layer.mlp = Experts(64, 96, 3)
    with adalora.attach(model, AdaLoraConfig(rank=2)) as adapter:
        ranks = adapter.report()["ranks"]
        assert set(ranks) == {*"qkvo"} | {f"mlp.experts.{n}.{name}" for n in range(3) for name in ("w1", "w2", "w3")}
        assert sum(map(sum, ranks.values())) == sum(adapter.ranks().values())
