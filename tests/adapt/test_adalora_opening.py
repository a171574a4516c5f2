"""Adapters that PEFT made in other ways: the logits that PEFT gives, from the opened adapter and from its export."""

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import VeloraConfig

from tenfold.adapt.adalora import AdaLoraConfig, open_adapter
from tenfold.errors import ModelError
from tenfold.models.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(5, 53).view(4, 12)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.clone()


def trained(folder, kind="llama", **settings):
    """Train an adapter with PEFT, save it, and return the logits that PEFT has after opening it."""
    torch.manual_seed(0)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    config = PeftLoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(tiny_model(kind).model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    expected = logits(PeftModel.from_pretrained(tiny_model(kind).model, folder))
    torch.testing.assert_close(expected, logits(model))
    return expected


PATTERNS = {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "alpha_pattern": {".*q_proj": 9}}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
        ("llama", {"init_lora_weights": "olora", **PATTERNS}),
        ("gpt2", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        ("llama", {"init_lora_weights": "eva"}),
        ("llama", {"init_lora_weights": "mica"}),
        ("llama", {"velora_config": VeloraConfig(num_groups=4)}),
        ("llama", PATTERNS),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"modules_to_save": ["norm"]}),
        ("llama", {"trainable_token_indices": [5, 6]}),
        ("gpt2", {"bias": "all"}),
        ("gpt2", {"bias": "lora_only"}),
    ],
    ids=str,
)
def test_opened_and_exported_as_peft_has_it(tmp_path, kind, settings):
    expected = trained(tmp_path / "lora", kind, **settings)
    adapter = open_adapter(tiny_model(kind).model, tmp_path / "lora")
    torch.testing.assert_close(logits(adapter.model), expected, rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(tiny_model(kind).model, adapter.export(tmp_path / "out"))
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(adapter.detach()), logits(tiny_model(kind).model))
    twice = open_adapter(tiny_model(kind).model, tmp_path / "out").export(tmp_path / "twice")
    again = PeftModel.from_pretrained(tiny_model(kind).model, twice)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_a_pissa_adapter_goes_on_under_a_budget(tmp_path):
    trained(tmp_path / "lora", init_lora_weights="pissa")
    config = AdaLoraConfig(rank=2, steps=12, tinit=1, tfinal=4, interval=1)
    adapter = open_adapter(tiny_model("llama").model, tmp_path / "lora", config)
    assert set(adapter.plan.ranks.values()) == {8}  # the update and what PiSSA had taken out of the weight
    optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(12):
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    opened = PeftModel.from_pretrained(tiny_model("llama").model, adapter.export(tmp_path / "out"))
    torch.testing.assert_close(logits(opened), logits(adapter.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "LORA with use_dora"),
        ({"lora_bias": True}, "LORA with lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "cannot read .*lora_embedding_A"),
    ],
    ids=str,
)
def test_what_is_no_low_rank_change_of_a_matrix_is_refused_by_name(tmp_path, settings, says):
    trained(tmp_path / "lora", **settings)
    with pytest.raises(ModelError, match=says):
        open_adapter(tiny_model("llama").model, tmp_path / "lora")


@pytest.mark.parametrize("start", ["loftq", "corda", "pissa_niter_4"])
def test_starts_that_cannot_be_taken_back_are_refused_by_name(tmp_path, start):
    """PEFT cannot open the last two either: CorDA asks for its covariances, PiSSA's fast start is random."""
    trained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    text = config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"')
    config.write_text(text)
    with pytest.raises(ModelError, match="LoftQ" if start == "loftq" else f"a {start} adapter"):
        open_adapter(tiny_model("llama").model, tmp_path / "lora")
