"""The stage LoRA on what an earlier run has made."""

import torch

from tenfold.models.open import open_model
from tests.runs import execute

IDS = torch.arange(5, 85).reshape(2, 40)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_training_on_an_adapter_folder_goes_on_from_it(number_rows, tmp_path):
    train = {"use": "lora", "data": str(number_rows), "rank": 2, "steps": 4, "max_length": 32, "learning_rate": 0.05}
    execute({"model": "tiny:llama", "stages": [train]}, tmp_path / "first")
    first = tmp_path / "first/01-lora/adapter"
    execute({"model": str(first), "stages": [{**train, "steps": 1, "learning_rate": 1e-9}]}, tmp_path / "second")
    again = open_model(tmp_path / "second/01-lora/adapter").model
    torch.testing.assert_close(logits(again), logits(open_model(first).model), atol=1e-4, rtol=0)
