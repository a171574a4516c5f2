"""Which class opens a configuration for a task; clear refusals where there is none, or weights are missing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tenfold.errors import ModelError


def check_loaded(model: Any, missing: Collection[str], name: str) -> None:
    """Refuse a model of which weights were not in the files; ``transformers`` fills them with random numbers.

    A new head for classification or reward is meant, so only the body under it must be complete.

    Args:
        model: as loaded.
        missing: names of parameters that no file held.
        name: the model, as the error should call it.

    Raises:
        ModelError: naming how many weights are missing, and the first.

    >>> from tenfold.models.tiny import tiny_model
    >>> check_loaded(tiny_model("llama", task="reward").model, ["score.weight"], "tiny")
    """
    scoring = type(model).__name__.endswith("ForSequenceClassification")
    body = f"{model.base_model_prefix}."
    lacking = sorted(key for key in missing if not scoring or key.startswith(body))
    if lacking:
        raise ModelError(
            f"{name}: {len(lacking)} weights are in no file, such as {lacking[0]}; they would be random",
            remedy="download the model again, or open it with the task that it was saved for",
        )


PEFT_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS", "reward": "SEQ_CLS"}
"""PEFT's name for each task."""


_DECODER = "take a decoder such as Llama, Qwen or GPT-2; in Python one may open it with task='seq2seq'"


def auto_class(config: Any, task: str, name: str) -> Any:
    """The ``transformers`` auto class that builds ``task``'s head on this configuration.

    Args:
        config: a ``PretrainedConfig``.
        task: ``causal``, ``seq2seq``, ``classification`` or ``reward``.
        name: the model, as the error should call it.

    Raises:
        ModelError: the architecture has no such head, or cannot do the task; names the tasks that it can do.

    >>> from transformers import T5Config
    >>> auto_class(T5Config(), "seq2seq", "t5").__name__
    'AutoModelForSeq2SeqLM'
    """
    import transformers
    from transformers.models.auto import modeling_auto as tables

    heads = {
        "causal": (transformers.AutoModelForCausalLM, tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "seq2seq": (transformers.AutoModelForSeq2SeqLM, tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        "classification": (
            transformers.AutoModelForSequenceClassification,
            tables.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
    }
    heads["reward"] = heads["classification"]
    builder, table = heads[task]
    remote = getattr(config, "auto_map", None) or {}
    if builder.__name__ in remote:
        return builder
    with_pictures = reads_pictures(config.model_type) and _decodes_text(config)
    if task == "causal" and with_pictures:
        _check_direction(config, task, name)
        return transformers.AutoModelForImageTextToText
    if config.model_type in table:
        _check_direction(config, task, name)
        return builder
    possible = [other for other, (_, names) in heads.items() if config.model_type in names]
    possible = ["causal", *possible] if with_pictures else possible
    if "causal" in possible and _sees_ahead(config):
        possible.remove("causal")
    remedy = f"open it with task={possible[0]!r}" if possible else "open a model of another architecture"
    if task == "causal" and possible[:1] == ["seq2seq"]:
        remedy = _DECODER
    if task == "reward" and "causal" in possible:
        remedy = "align it on pairs with target dpo, which needs no such head, or take a model of another architecture"
    others = f"; they have {', '.join(possible)}" if possible else ""
    raise ModelError(f"{name}: {config.model_type} models have no head for task {task!r}{others}", remedy=remedy)


def reads_pictures(model_type: str) -> bool:
    """Whether transformers opens a model that writes text as one for pictures and text, and not as a causal one.

    Such a model is opened whole, so that adapters fit it as others have it, and reads texts alone.

    >>> reads_pictures("llava"), reads_pictures("gemma3"), reads_pictures("llama")
    (True, False, False)
    """
    from transformers.models.auto import modeling_auto as tables

    return (
        model_type in tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and model_type not in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def _decodes_text(config: Any) -> bool:
    """Whether a composite configuration has a decoder for its text."""
    text = config.get_text_config()
    return text is not config and not getattr(text, "is_encoder_decoder", False) and not config.is_encoder_decoder


def _check_direction(config: Any, task: str, name: str) -> None:
    """Refuse what ``transformers`` opens with a warning: encoders that predict tokens which they see."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        if task in ("causal", "reward"):
            raise ModelError(
                f"{name}: {kind} has an encoder beside its decoder, which task {task!r} has no use for",
                remedy=_DECODER,
            )
        return
    if task == "causal" and getattr(config.get_text_config(), "use_bidirectional_attention", None):
        raise ModelError(
            f"{name}: {kind} reads a text in both directions: its attention sees the tokens that it would have to "
            "predict",
            remedy="take a decoder such as Llama, Qwen or GPT-2, or a vision-language model such as Qwen2.5-VL",
        )
    if task == "causal" and _sees_ahead(config):
        raise ModelError(
            f"{name}: {kind} is an encoder: its attention sees the tokens that it would have to predict",
            remedy="take a decoder such as Llama, Qwen or GPT-2, or open it with task='classification'",
        )


def _sees_ahead(config: Any) -> bool:
    """Whether it is an encoder, also where ``transformers`` has a class by which it would predict the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in MASKED and not decodes and not getattr(config, "is_encoder_decoder", False)
