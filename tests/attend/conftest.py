"""What the tests of this room share."""

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface


def flash(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **arguments):
    """What a flash kernel takes: a mask of padding or none, the usual direction, no bias."""
    assert arguments.get("position_bias") is None
    assert query.shape[-1] % 8 == 0
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert attention_mask is None or attention_mask.ndim == 2
    queries, keys = query.shape[2], key.shape[2]
    after = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    allowed = (after <= 0)[None, None]
    if sliding_window is not None:
        allowed = allowed & (after > -sliding_window)
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, None]
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


@pytest.fixture(autouse=True, scope="session")
def _made_up_flash():
    """``made_up_flash``: no flash kernel runs on a CPU, so this stands for one."""
    AttentionInterface.register("made_up_flash", flash)
    AttentionMaskInterface.register("made_up_flash", flash_attention_mask)
