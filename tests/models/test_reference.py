"""A reference is plain data: cheap to make, compare and fingerprint."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys

import peft
import pytest

from tenfold.errors import ModelError
from tenfold.models.export import save_adapter, save_model
from tenfold.models.reference import ModelRef
from tenfold.models.tiny import tiny_model

# PEFT 0.21 asks for a property that transformers 5.23 renamed (2026-07).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    opened = tiny_model("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(opened.model, config)
    return save_adapter(model, opened.tokenizer, tmp_path / "adapter", base="tiny:llama")


def test_identity_needs_no_torch():
    script = (
        "import sys\nfrom tenfold.models.reference import ModelRef\nModelRef('tiny:llama').identity()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_identity_agrees_with_the_opened_model(tmp_path, adapter):
    opened = tiny_model("qwen2")
    folder = save_model(opened.model, opened.tokenizer, tmp_path / "model")
    for ref in (ModelRef(str(folder)), ModelRef("tiny:llama"), ModelRef("tiny:llama").with_adapter(adapter)):
        found = ref.open().identity
        assert (found["weights"], found["adapters"]) == (ref.identity()["weights"], ref.identity()["adapters"])


def test_identity_ignores_places_and_sees_everything_else(tmp_path, adapter):
    moved = shutil.copytree(adapter, tmp_path / "elsewhere")
    ref = ModelRef("tiny:llama").with_adapter(adapter)
    assert ref.identity() == ModelRef("tiny:llama").with_adapter(moved).identity() == ModelRef(str(adapter)).identity()
    others = [
        ModelRef("tiny:llama"),
        ModelRef("tiny:qwen2"),
        ModelRef("tiny:llama", task="reward"),
        ModelRef("tiny:llama", dtype="bfloat16"),
    ]
    assert len({str(other.identity()) for other in [ref, *others]}) == 5


def test_open_and_merge(adapter):
    ref = ModelRef("tiny:llama", device="cpu").with_adapter(adapter)
    assert hasattr(ref.open().model, "peft_config")
    assert type(ref.open(merge=True).model).__name__ == "LlamaForCausalLM"


def test_plain_data():
    ref = ModelRef("demo", adapters=("a", "b"))
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert hash(ref) == hash(ModelRef("demo").with_adapter("a").with_adapter("b"))


def test_missing_source():
    with pytest.raises(ModelError, match="no such folder"):
        ModelRef("./nowhere").identity()
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        ModelRef("tiny:llama").with_adapter("./nowhere").identity()
