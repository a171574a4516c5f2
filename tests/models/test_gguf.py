"""GGUF files are converted once, exactly, and never half."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tenfold.errors import ModelError, RunError
from tenfold.models import gguf
from tenfold.models.embedded import demo_file
from tenfold.models.folders import is_complete
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("hello world", return_tensors="pt")).logits


def in_a_process(body: str, cache: Path, **options) -> subprocess.Popen:
    script = "import os, signal, sys\nfrom tenfold.models import gguf\n" + textwrap.dedent(body)
    environment = {**os.environ, "TENFOLD_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, **options)


def test_reopened_folder_gives_the_same_logits(tiny_gguf, cache):
    opened = open_model(str(tiny_gguf), device="cpu")
    model, tokenizer = gguf.load_gguf(tiny_gguf)
    assert torch.equal(logits(opened.model, opened.tokenizer), logits(model, tokenizer))
    assert opened.tokenizer.chat_template == tokenizer.chat_template
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]  # of the text, and of a turn
    assert opened.model.generation_config.eos_token_id == ends
    assert opened.identity["weights"] == gguf.gguf_sha256(tiny_gguf)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_weights_are_those_that_were_written(tmp_path, cache, write_gguf, kind):
    opened = open_model(str(write_gguf(tmp_path / "m.gguf", kind)), device="cpu")
    written = tiny_model(kind, vocab_size=263).model.state_dict()
    found = opened.model.state_dict()
    assert set(found) == set(written)
    for name, weight in written.items():
        step = weight.abs().max() / 127 if weight.ndim == 2 else 1e-6  # 8-bit matrices, exact vectors
        assert (found[name] - weight).abs().max() <= step


def test_tied_weights_stay_tied(tmp_path, cache, write_gguf):
    model = open_model(str(write_gguf(tmp_path / "m.gguf", "gemma3")), device="cpu").model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_folder_can_be_saved_again(tiny_gguf, cache, tmp_path):
    opened = open_model(str(tiny_gguf), device="cpu")
    opened.model.save_pretrained(tmp_path / "copy")  # refused by transformers on a model that was loaded from GGUF
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_converted_once(tiny_gguf, cache, monkeypatch):
    first = gguf.converted(tiny_gguf)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    assert gguf.converted(tiny_gguf) == first


def test_damaged_folder_is_made_again(tiny_gguf, cache):
    folder = gguf.converted(tiny_gguf)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert gguf.converted(tiny_gguf) == folder
    assert weights.read_bytes() == whole


def test_checksum_is_remembered_until_the_file_changes(tiny_gguf, cache, tmp_path, monkeypatch):
    file = Path(shutil.copy(tiny_gguf, tmp_path / "m.gguf"))
    first = gguf.gguf_sha256(file)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
        assert gguf.gguf_sha256(file) == first
    with file.open("ab") as stream:
        stream.write(b"x")
    assert gguf.gguf_sha256(file) != first


def test_killed_conversion_leaves_no_folder_and_the_next_one_works(tiny_gguf, cache):
    killed = in_a_process(
        f"""
        from transformers import PreTrainedTokenizerFast
        # The weights are written by now, the tokenizer is not.
        PreTrainedTokenizerFast.save_pretrained = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        gguf.converted({str(tiny_gguf)!r})
        """,
        cache,
    )
    killed.communicate(timeout=120)
    assert killed.returncode == -9
    leftovers = [path for path in cache.iterdir() if path.is_dir()]
    assert [path.name[0] for path in leftovers] == ["."]
    assert any(leftovers[0].iterdir())
    assert is_complete(gguf.converted(tiny_gguf))
    assert not leftovers[0].exists()


def test_two_processes_convert_once(tiny_gguf, cache, tmp_path):
    body = f"""
        import time
        convert = gguf._convert
        def counted(*arguments):
            open({str(tmp_path / "log")!r}, "a").write("converted\\n")
            time.sleep(1.0)  # long enough for the other to arrive
            convert(*arguments)
        gguf._convert = counted
        print(gguf.converted({str(tiny_gguf)!r}))
        """
    both = [in_a_process(body, cache, stdout=subprocess.PIPE) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(answers) == 1
    assert (tmp_path / "log").read_text() == "converted\n"


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_truncated_file(tiny_gguf, cache, tmp_path, keep):
    whole = tiny_gguf.read_bytes()
    file = tmp_path / "short.gguf"
    file.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ModelError, match=rf"short.gguf: truncated or corrupt GGUF \({file.stat().st_size} bytes\)"):
        open_model(str(file), device="cpu")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_not_a_gguf_file(cache, tmp_path, content):
    file = tmp_path / "page.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=rf"page.gguf: not a GGUF file \({len(content)} bytes"):
        open_model(str(file), device="cpu")


def test_missing_tensor_is_an_error_and_not_random(tiny_gguf, cache, tmp_path):
    file = tmp_path / "renamed.gguf"
    file.write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ModelError, match=r"1 weights are in no file, such as model\.layers\.1\.mlp\.up_proj"):
        open_model(str(file), device="cpu")


def test_unknown_architecture(tiny_gguf, cache, tmp_path):
    file = tmp_path / "novel.gguf"
    file.write_bytes(tiny_gguf.read_bytes().replace(b"qwen2", b"novel"))
    with pytest.raises(ModelError, match="novel"):
        open_model(str(file), device="cpu")


def test_cache_that_cannot_be_written(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunError, match="cache cannot be written"):
        open_model(str(tiny_gguf), device="cpu")


def test_demo_opens_as_the_same_model_again(demo):
    opened = open_model("demo", device="cpu")
    assert opened.identity == demo.identity
    assert opened.identity["parameters"] == 134_515_008


def test_demo_is_a_chat_model_with_tied_weights(demo):
    assert demo.model.lm_head.weight is demo.model.model.embed_tokens.weight
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = demo.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = demo.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in demo.tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


@pytest.mark.slow
def test_demo_conversion_is_exact(demo):
    model, tokenizer = gguf.load_gguf(demo_file())
    assert torch.equal(logits(demo.model, demo.tokenizer), logits(model, tokenizer))
    for text in ("def f(x):\n    return 12345", "naïve 漢字 🙂"):
        assert demo.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
