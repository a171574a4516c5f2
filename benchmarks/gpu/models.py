"""Random models of real shapes, made on the device itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.bench import Bench, Shape

VOCABULARY = 32_000


def random_llama(bench: Bench, shape: Shape) -> Any:
    """A Llama of a few layers of a real shape in bfloat16, with random weights; its embedding is small."""
    config = LlamaConfig(
        vocab_size=bench.sizes(VOCABULARY, 200),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.channels,
        max_position_embeddings=262_144,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = LlamaForCausalLM(config)
    # Rotary frequencies are buffers of float32 in a model that is opened from a file as well.
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model = model.to(bench.dtype).eval()
    model.model.rotary_emb.inv_freq = frequencies
    return model.requires_grad_(False)


def random_ids(bench: Bench, batch: int, tokens: int) -> torch.Tensor:
    """Token ids ``[batch, tokens]`` on the device."""
    generator = torch.Generator(bench.device).manual_seed(tokens)
    return torch.randint(5, bench.sizes(VOCABULARY, 200), (batch, tokens), generator=generator, device=bench.device)


def in_float64(model: Any) -> Any:
    """The same model in float64."""
    import copy

    double = copy.deepcopy(model).double()
    double.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    return double
