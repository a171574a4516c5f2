"""What methods that share a tensor mean together, written out: one dense softmax in float64, from their definitions.

Nothing of the package's attention, kernels or caches is used: visible pairs, biases and the softmax are spelled out for
one row at a time, and the whole text is read in one pass.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "compose_dense"


@dataclass
class Meaning:
    """What is asked of attention.

    Args:
        prompt: tokens of the prompt.
        marked: which of them are emphasised.
        heads: query heads by layer that are steered.
        alpha: factor of what is not emphasised.
        spans: layer -> window of the last keys; others see everything.
    """

    prompt: int
    marked: list[int] = field(default_factory=list)
    heads: dict = field(default_factory=dict)
    alpha: float = 1.0
    spans: dict = field(default_factory=dict)


_NOW = []


def _attend(module, query, key, value, attention_mask, scaling=None, **_):
    meaning, layer = _NOW[-1], module.layer_idx
    heads, n = query.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    rows, columns = torch.arange(n)[:, None], torch.arange(n)
    visible = columns <= rows
    window = meaning.spans.get(layer) or getattr(module, "sliding_window", None)  # None in layers of full attention
    if window:
        visible = visible & (rows - columns < window)
    marked = torch.zeros(n, dtype=torch.bool)
    marked[meaning.marked] = True
    if meaning.marked:
        low = math.log(meaning.alpha)
        bias = torch.where(~marked & (columns < meaning.prompt), low, 0.0).expand(n, n).clone()
        sees = (visible & marked).any(1)
        bias[~sees] = 0.0  # a query that sees no mark is left alone
        # ... and so is a head that sees none from the end of the prompt.
        for head in meaning.heads.get(layer, ()) if sees[meaning.prompt - 1] else ():
            scores[:, head] += bias
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@torch.no_grad()
def log_probabilities(model, ids, meaning):
    """Of each token after those before it, ``[tokens - 1, vocabulary]``, float64; the model is copied, not changed."""
    plain = copy.deepcopy(model).double().eval()
    plain.set_attn_implementation(NAME)
    _NOW.append(meaning)
    try:
        return plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    finally:
        _NOW.pop()
