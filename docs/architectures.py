"""The page of models: what can be done with which architecture, from the table that tests hold to."""

from __future__ import annotations

from tests.architectures import OPERATIONS, REASONS, TABLE, Kind

KINDS: dict[Kind, str] = {
    "dense": "Dense decoders",
    "experts": "Mixtures of experts",
    "recurrent": "Recurrent models",
    "hybrid": "Hybrids of recurrent layers and attention",
    "pictures": "Models of pictures and text, on text",
}

_OPENING = """# Models

A model is opened by its folder or hub id and adapted as it is: which matrix plays which part is found by structure, so
an architecture needs no entry anywhere. Below is what was tried, with tiny random models of {count} architectures:
{works} of {cells} operations work, {refused} are refused in one line that names the reason and what to do instead.
`tests/models/test_architectures.py` holds every cell. Others are likely to work, and were not tried.

## What is adapted

- `all-linear`, the default, is every linear layer of the blocks, as in PEFT; `attention`, `mlp` and `mixer`
  (recurrent layers and convolutions) are parts of it. Targets may be roles, module names, suffixes or regular
  expressions.
- **Experts** are adapted where they are linear layers. In transformers 5 most are slices of one parameter: these and
  the routers stay as they are, attention and shared parts are adapted, and a note of the stage says what was left out.
- In DeepSeek-V3, Qwen3-Next and their kin, PEFT {peft} takes the names `gate_proj`, `up_proj` and `down_proj` for the
  stacked experts, also where a dense or shared part has them: under `target_modules` nothing can name these layers, so
  they stay. PEFT's `target_parameters` can (`model.layers.0.mlp.shared_expert.gate_proj.weight`), from Python.
- In **Mamba** and its kin `in_proj` is adapted. The model reads the weights of `x_proj`, `dt_proj` and `out_proj`
  without calling the layers: an adapter there would not be seen, and asking for one is refused.
- Weights that several layers share (Zamba) stay as they are: an adapter on one could not be merged.
- `tenfold adapt --method full` trains all of them.

**Models of pictures and text** (Llava, Qwen2.5-VL, SmolVLM, Mistral Small) are opened whole and read texts alone: what
is adapted is their language model, the adapter fits the model as others have it, and pictures in the data are refused.
PaliGemma reads a text in both directions, so nothing of it can be predicted, and is refused.

Recurrent models have no KV cache: `speed` and `memory` leave its figures out. In batches of unequal texts every text
has the log-probabilities that it has alone, in scoring and in writing.
"""


def page() -> str:
    """The page, whole."""
    cells = [row.refused.get(operation) for row in TABLE for operation in OPERATIONS]
    counts = {"count": len(TABLE), "cells": len(cells), "works": cells.count(None)}
    parts = [_OPENING.format(**counts, refused=len(cells) - counts["works"], peft=_peft())]
    parts.append("## What works\n\n" + "".join(f"- **{name}**: {said}\n" for name, said in OPERATIONS.items()))
    parts += [f"### {title}\n\n{_table(kind)}" for kind, title in KINDS.items()]
    parts.append(
        "## Why something is refused\n\n" + "".join(f"- **{name}**: “… {said} …”\n" for name, said in REASONS.items())
    )
    return "\n".join(parts)


def _table(kind: Kind) -> str:
    head = f"| | `model_type` | {' | '.join(OPERATIONS)} |\n|---|---|{'---|' * len(OPERATIONS)}\n"
    rows = [row for row in TABLE if row.kind == kind]
    return head + "".join(
        f"| {row.name} | `{row.model_type}` | {' | '.join(row.refused.get(name, '✓') for name in OPERATIONS)} |\n"
        for row in rows
    )


def _peft() -> str:
    from importlib.metadata import version

    return ".".join(version("peft").split(".")[:2])
