"""GGUF files that are written: what transformers and llama.cpp make of them is the model that was given."""

from __future__ import annotations

import importlib.util
import os

import gguf
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from tenfold.errors import ConfigError, ModelError, RunError
from tenfold.models.gguf import load_gguf
from tenfold.models.gguf_mixes import native_mix
from tenfold.models.gguf_write import gguf_sizes, write_gguf
from tenfold.models.open import open_model
from tenfold.models.tiny import tiny_model
from tests.tokenizers import CORPUS

TEXT = "hello wörld 12, and some more words that go on and on. " * 3
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def sharp(kind="llama", **fields):
    """A tiny model in which a wrong angle, scale, norm, bias or window shows."""
    opened = tiny_model(kind, **fields)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in opened.model.parameters():
            parameter.mul_(5) if parameter.ndim == 2 else parameter.add_(torch.randn_like(parameter) * 0.3)
    return opened


def written(opened, path, types="f32", **options):
    write_gguf(opened.model, opened.tokenizer, path, types, **options)
    return path


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def engine():
    """llama.cpp on a file, one thread."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip('no xllamacpp here: pip install "tenfold[gguf]"')
    from tenfold.engines.llama_cpp import LlamaCpp

    return lambda path: LlamaCpp(path, context=512, parallel=1, threads=1)


def check_engine(server, model, ids, tolerance=0.02):
    """llama.cpp's log-probabilities after several beginnings are those of transformers (keys are in half precision)."""
    right = logits_of(model, ids)[0].log_softmax(-1)
    assert right.std() > 0.5
    for at in (4, 40, ids.shape[1] - 1):
        for token in (10, 77, 200):
            found = server._probability(ids[0, :at].tolist(), token)
            assert found == pytest.approx(float(right[at - 1, token]), abs=tolerance), (at, token)


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_compute_what_the_model_computes(kind, tmp_path, engine):
    opened = sharp(kind)
    path = written(opened, tmp_path / "m.gguf")
    ids = opened.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model, tokenizer = load_gguf(path)
    assert tokenizer(TEXT)["input_ids"] == ids[0].tolist()
    assert tokenizer.chat_template == opened.tokenizer.chat_template
    assert (logits_of(model, ids) - logits_of(opened.model, ids)).abs().max() < 1e-5
    server = engine(path)
    assert server._tokens(TEXT) == ids[0].tolist()
    check_engine(server, opened.model, ids)


ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        YARN,
        {**YARN, "beta_fast": 16.0, "attention_factor": 1.4},
        {**LLAMA3, "original_max_position_embeddings": 8192},
        {**LLAMA3, "original_max_position_embeddings": 64},
    ],
)
def test_rotary_scaling(rope, tmp_path, engine):
    opened = sharp(rope_parameters={**ROPE, **rope})
    path = written(opened, tmp_path / "m.gguf")
    ids = opened.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model = load_gguf(path)[0]
    assert (logits_of(model, ids) - logits_of(opened.model, ids)).abs().max() < 1e-3
    check_engine(engine(path), opened.model, ids)
    again = written(type(opened)(model, opened.tokenizer, opened.identity), tmp_path / "again.gguf")
    first, second = (
        {one.name: one.data for one in gguf.GGUFReader(str(file)).tensors if one.name == "rope_freqs.weight"}
        for file in (path, again)
    )
    assert first.keys() == second.keys()
    assert all(abs(first[name] - second[name]).max() < 1e-3 for name in first)


def test_more_shapes_of_llama_and_gemma(tmp_path):
    """Biases, heads wider than their share, scaling of full attention alone, every layer alike."""
    scaled = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }
    for kind, fields in (
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("gemma3", {"rope_parameters": scaled}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 2}),
        ("gemma3", {"layer_types": ["full_attention"] * 2}),
        ("llama", {"tie_word_embeddings": True}),
    ):
        opened = sharp(kind, **fields)
        ids = opened.tokenizer(TEXT, return_tensors="pt")["input_ids"]
        model = load_gguf(written(opened, tmp_path / "m.gguf"))[0]
        assert (logits_of(model, ids) - logits_of(opened.model, ids)).abs().max() < 1e-4, fields


def test_sizes_are_those_of_the_file(tmp_path):
    """Of mixed types, some of which do not fit rows of 64, 96 or 48."""
    opened = tiny_model("qwen2", intermediate_size=96, hidden_size=48)
    mixed = ("q8_0", "mxfp4", "q5_1", "Q6_K", "f16")
    modules = [one.module for one in gguf_sizes(opened.model, "f16").tensors if one.module]
    types = {module: mixed[index % 5] for index, module in enumerate(modules)}
    sizes = gguf_sizes(opened.model, types, opened.tokenizer)
    assert write_gguf(opened.model, opened.tokenizer, tmp_path / "m.gguf", types) == sizes
    assert sizes.total == os.path.getsize(tmp_path / "m.gguf")
    assert gguf_sizes(opened.model, types).tensor_bytes == sizes.total - sizes.metadata
    with pytest.raises(ConfigError, match="metadata"):
        _ = gguf_sizes(opened.model, types).total
    stored = {
        one.name: (one.tensor_type.name.lower(), int(one.n_bytes))
        for one in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors
    }
    assert stored == {one.name: (one.type, one.bytes) for one in sizes.tensors}
    assert {one.type for one in sizes.tensors if not one.module} == {"f32"}
    fallen = {(one.asked, one.type) for one in sizes.fallbacks}
    assert ("q6_k", "q8_0") in fallen or ("q6_k", "f16") in fallen
    assert "not q6_k: their rows do not divide" in str(sizes)


def test_a_shared_weight_is_one_tensor_with_one_type(tmp_path):
    opened = tiny_model("gemma3")
    modules = [one.module for one in gguf_sizes(opened.model, "q8_0").tensors if one.module]
    assert "lm_head" not in modules
    types = dict.fromkeys(modules, "q4_0")
    by_head = {name: kind for name, kind in types.items() if name != "model.embed_tokens"} | {"lm_head": "q8_0"}
    sizes = gguf_sizes(opened.model, by_head)
    assert [(one.name, one.type) for one in sizes.tensors if one.type == "q8_0"] == [("token_embd.weight", "q8_0")]
    with pytest.raises(ConfigError, match=r"lm_head and model\.embed_tokens share one weight"):
        gguf_sizes(opened.model, types | {"lm_head": "q8_0"})
    untied = gguf_sizes(tiny_model("gemma3", tie_word_embeddings=False).model, "q8_0")
    assert sum(one.module in ("lm_head", "model.embed_tokens") for one in untied.tensors) == 2


def test_every_matrix_needs_a_type():
    model = tiny_model("llama").model
    with pytest.raises(ConfigError, match=r"types: none for model\.embed_tokens.* and 12 more"):
        gguf_sizes(model, {"lm_head": "q8_0"})
    with pytest.raises(ConfigError, match=r"types: no matrix named 'model\.layers\.7\.mlp\.up_proj'"):
        gguf_sizes(model, {"model.layers.7.mlp.up_proj": "q8_0"})
    with pytest.raises(ConfigError, match="unknown GGUF type 'q7_0'"):
        gguf_sizes(model, "q7_0")


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("gpt2", {}, "GPT2LMHeadModel cannot be written"),
        ("mistral", {"sliding_window": 32}, "sliding_window = 32"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": {**ROPE, **YARN, "truncate": False}}, "truncate"),
        ("qwen3", {"attention_bias": True}, r"self_attn\.q_proj\.bias"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(kind, fields, named, tmp_path):
    opened = tiny_model(kind, **fields)
    with pytest.raises(ModelError, match=named):
        written(opened, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_adapters_must_be_merged_first():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama").model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="adapters are attached"):
        gguf_sizes(model, "q8_0")


def test_a_file_appears_whole_and_takes_only_our_place(tmp_path):
    opened, path = tiny_model("llama"), tmp_path / "m.gguf"
    path.write_bytes(b"GGUF of somebody else")
    with pytest.raises(RunError, match="was not written by tenfold"):
        written(opened, path)
    assert path.read_bytes() == b"GGUF of somebody else"
    written(opened, path, overwrite=True)
    before = path.read_bytes()
    written(opened, path)  # our own file is replaced without a word
    assert path.read_bytes() == before
    with torch.no_grad():
        opened.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: .*NaN"):
        written(opened, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_importance_reaches_its_matrix(tmp_path):
    opened, name = sharp("llama"), "model.layers.1.mlp.down_proj"
    importance = torch.rand(128) ** 4
    plain = written(opened, tmp_path / "plain.gguf", "q4_0")
    weighted = written(opened, tmp_path / "weighted.gguf", "q4_0", importance={name: importance})
    files = [gguf.GGUFReader(str(file)).tensors for file in (plain, weighted)]
    assert [a.name for a, b in zip(*files, strict=True) if (a.data != b.data).any()] == ["blk.1.ffn_down.weight"]
    with pytest.raises(ConfigError, match="importance: no matrix named 'lm_heed'"):
        written(opened, tmp_path / "m.gguf", "q4_0", importance={"lm_heed": importance})


def trained(split):
    """A byte-level tokenizer with merges, split as a real one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    parts = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "qwen2": [_regex(r"\p{N}")],
        "smaug-bpe": [_regex(r"\p{N}{1,3}")],
        "llama-bpe": [_regex(r"\p{N}{1,3}")],
    }[split]
    inner = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    parts = [pre_tokenizers.Split(Regex(one), "isolated") if isinstance(one, str) else one for one in parts]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([*parts, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numbers = [str(number) for number in range(1000)] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|endoftext|>", "<|im_end|>"]
    )
    inner.train_from_iterator([*CORPUS, *numbers], trainer)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|im_end|>"],
    )


def _regex(digits):
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


HARD = "It's 1234567 o'clock;  they'LL say:\n\n\t«naïve» 天空 🙂 x=12 <|im_end|> 0.5\r\n the answer is yes "


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "smaug-bpe", "llama-bpe"])
def test_byte_level_tokenizers(split, tmp_path, engine):
    tokenizer = trained(split)
    opened = tiny_model("llama", vocab_size=len(tokenizer) + 5)  # padded, as embeddings often are
    path = tmp_path / "m.gguf"
    write_gguf(opened.model, tokenizer, path, "f16")
    fields = gguf.GGUFReader(str(path)).fields
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 4}]"
    expected = tokenizer(HARD)["input_ids"]
    assert load_gguf(path)[1](HARD)["input_ids"] == expected
    assert engine(path)._tokens(HARD) == expected


@pytest.mark.parametrize(("kind", "prefix"), [("gemma3", "never"), ("llama", "first")])
def test_sentencepiece_tokenizers(kind, prefix, tmp_path, engine):
    tokenizer = scored(prefix)
    opened = tiny_model(kind, vocab_size=len(tokenizer))
    path = tmp_path / "m.gguf"
    write_gguf(opened.model, tokenizer, path, "f16")
    # llama.cpp puts a word mark after special tokens as well, as Llama 2 does, where others do at the beginning alone
    text = HARD if prefix == "never" else HARD.replace("<|im_end|>", "")
    expected = tokenizer(text)["input_ids"]
    assert load_gguf(path)[1](text)["input_ids"] == expected
    assert engine(path)._tokens(text) == expected


def scored(prefix):
    """A tokenizer whose merges follow from scores, as those made from SentencePiece models do."""
    from tokenizers import models

    from tests.tokenizers import metaspace

    base = metaspace(prefix)
    vocabulary = base.get_vocab()
    plain = {token for token in vocabulary if not token.startswith("<") or len(token) == 1}
    whole = sorted(plain, key=vocabulary.get)
    merges = [(t[:cut], t[cut:]) for t in whole for cut in range(1, len(t)) if {t[:cut], t[cut:]} <= plain]
    inner = base.backend_tokenizer
    inner.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return base


def test_a_tokenizer_that_llama_cpp_cannot_be_told_of_is_refused(tmp_path):
    from tests.tokenizers import byte_level, metaspace, word_piece

    for tokenizer, named in (
        (byte_level(), "no known name for how this tokenizer splits"),
        (metaspace("never"), "an order that llama.cpp's scores cannot say"),
        (word_piece(), "WordPiece"),
    ):
        opened = tiny_model("llama", vocab_size=len(tokenizer))
        with pytest.raises(ModelError, match=named):
            write_gguf(opened.model, tokenizer, tmp_path / "m.gguf", "f16")
    with pytest.raises(ModelError, match="262 tokens, the embedding 100 rows"):
        written(tiny_model("llama", vocab_size=100), tmp_path / "m.gguf")


def test_what_a_file_says_of_itself_is_taken_over(tiny_gguf, cache, tmp_path):
    opened = open_model(str(tiny_gguf), device="cpu")
    opened.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    path = written(opened, tmp_path / "m.gguf", "q8_0")
    old, new = (gguf.GGUFReader(str(file)) for file in (tiny_gguf, path))
    for name, field in old.fields.items():
        if name.startswith(("qwen2.", "tokenizer.ggml.", "general.name")):
            assert new.fields[name].contents() == field.contents(), name
            assert new.fields[name].types == field.types, name
    assert new.fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    before = {one.name: one for one in old.tensors}
    for one in new.tensors:
        assert one.tensor_type == before[one.name].tensor_type
        assert (one.data == before[one.name].data).all()
    # with a token more it is not the file's tokenizer any more
    opened.tokenizer.add_tokens(["<novel>"])
    opened.model.resize_token_embeddings(len(opened.tokenizer))
    fields = gguf.GGUFReader(str(written(opened, path, "q8_0"))).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "<novel>"


def gemma_270m():
    """On the meta device: sizes and mixes look at shapes alone."""
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
    )  # fmt: skip
    with torch.device("meta"):
        return Gemma3ForCausalLM(config)


def qwen_half_b():
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "tensor_bytes", "more", "head"),
    [
        # gemma-3-270m Q4_K_M: a shared embedding, and rows that do and do not divide by 256
        (gemma_270m, 246_587_904, [0, 1, 4, 7, 10, 13, 15, 16, 17], ("token_embd.weight", "q8_0")),
        # Qwen2.5-Coder-0.5B Q4_K_M: llama.cpp of that time counted the layers 0, 1, 10, 11, ..., here in their order
        (qwen_half_b, 485_452_288, [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23], ("output.weight", "q8_0")),
    ],
)
def test_native_mix_is_that_of_published_files(build, tensor_bytes, more, head):
    """Types and bytes as read from the files of 2025; their sections of tensors have exactly this size."""
    model = build()
    sizes = gguf_sizes(model, native_mix("Q4_K_M", model))
    types = {one.name: one.type for one in sizes.tensors}
    assert sizes.tensor_bytes == tensor_bytes
    layers = range(model.config.num_hidden_layers)
    assert [layer for layer in layers if types[f"blk.{layer}.ffn_down.weight"] == "q6_k"] == more
    assert [layer for layer in layers if types[f"blk.{layer}.attn_v.weight"] == "q8_0"] == more  # for q6_k
    assert types[head[0]] == head[1]
    assert types["blk.2.attn_q.weight"] == "q5_0"  # for q4_k, as rows of 640 and 896 do not divide


def test_native_mixes_by_their_rules():
    model = gemma_270m()  # four heads on one key head, 18 layers; attn_output and ffn_down divide by 256
    mixes = {name: native_mix(name, model) for name in ("Q2_K", "Q3_K_M", "Q4_K_S", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS")}
    down = "model.layers.{}.mlp.down_proj"
    assert [mixes["Q4_K_S"][down.format(layer)] for layer in (0, 1, 2, 17)] == ["q5_k", "q5_k", "q4_k", "q4_k"]
    assert [mixes["Q3_K_M"][down.format(layer)] for layer in (0, 1)] == ["q5_k", "q4_k"]
    assert {mixes["Q2_K"][down.format(layer)] for layer in range(18)} == {"q3_k"}
    assert [mixes["IQ4_XS"][down.format(layer)] for layer in (1, 2)] == ["q5_k", "iq4_xs"]
    assert native_mix("IQ4_XS", model, weighted=True)[down.format(1)] == "iq4_xs"
    assert native_mix("Q4_0", model, weighted=True)[down.format(1)] == "q4_1"
    assert native_mix("Q4_0", model)[down.format(1)] == "q4_0"
    assert set(mixes["Q8_0"].values()) == {"q8_0"}
    sizes = [gguf_sizes(model, mixes[name]).tensor_bytes for name in ("Q2_K", "Q4_K_S", "Q5_K_M", "Q6_K")]
    assert sizes == sorted(set(sizes))
    with pytest.raises(ConfigError, match="unknown mix 'Q4_K_XL'"):
        native_mix("Q4_K_XL", model)


@pytest.mark.slow
def test_the_embedded_model_answers_in_llama_cpp(demo, tmp_path, engine):
    from tenfold.engines.requests import Request
    from tenfold.engines.session import Session
    from tenfold.models.embedded import demo_file

    path = tmp_path / "demo.gguf"
    sizes = write_gguf(demo.model, demo.tokenizer, path, "q8_0")
    assert sizes.total == os.path.getsize(path)
    assert not sizes.fallbacks
    fields = gguf.GGUFReader(str(path)).fields
    for name, field in gguf.GGUFReader(str(demo_file())).fields.items():
        if name.startswith(("llama.", "tokenizer.", "general.name", "general.license")):
            assert fields[name].contents() == field.contents(), name
    server, session = engine(path), Session(demo)
    question = "What is the capital of France? Answer in one word."
    request = Request(messages=({"role": "user", "content": question},), max_new_tokens=8)
    assert "Paris" in server.generate([request])[0].text
    prompts = [Request("The capital of France is"), Request("Two and two make")]
    tails = [" Paris.", " four, as everybody knows."]
    exact = tmp_path / "exact.gguf"
    write_gguf(demo.model, demo.tokenizer, exact, "f32")
    right = session.score(prompts, tails)
    for one, nats in ((server, 0.2), (engine(exact), 0.005)):  # beside 8-bit weights, llama.cpp rounds inputs to 8 bits
        for here, there in zip(one.score(prompts, tails), right, strict=True):
            for tail in tails:
                close = pytest.approx(there.log_probabilities[tail], abs=nats * len(server._tokens(tail)))
                assert here.log_probabilities[tail] == close, tail
