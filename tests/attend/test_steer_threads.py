"""Blocks that overlap: in threads, out of order, and with what others do to transformers' registries meanwhile."""

import threading

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface

from tenfold.attend import masformer
from tenfold.attend.attention import installed
from tenfold.attend.pasta import steer
from tenfold.attend.pasta.attention_share import attention_mass
from tenfold.attend.text_marks import Marks
from tenfold.errors import ConfigError, ModelError
from tenfold.kernels.local import AttentionWindow
from tenfold.models.tiny import tiny_model

HEADS = {0: [1], 1: [0, 3]}
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def marks_of(start, seed=0, length=24):
    ids = torch.randint(6, 200, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[1, :3] = 0
    mask, marked = (ids > 0).long(), torch.zeros(2, length, dtype=torch.bool)
    marked[:, start : start + 4] = True
    return Marks(ids, mask, marked, torch.ones(2, length))


def in_threads(*jobs):
    """Run each at once in a thread of its own; their results, errors among them."""
    found = [None] * len(jobs)

    def run(index, job):
        try:
            found[index] = job()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def written(model, marks):
    return model.generate(**marks.inputs, **OPTIONS)


def clean(model, implementation="sdpa"):
    hooks = any(module._forward_pre_hooks for module in model.modules())
    return model.config._attn_implementation == implementation and not hooks


@pytest.mark.parametrize("same_prompt", [True, False])
def test_threads_steer_one_model_each_with_its_own_marks(same_prompt):
    model = tiny_model("llama").model
    pair = [marks_of(5), marks_of(14, seed=0 if same_prompt else 1)]
    expected = []
    for marks in pair:
        with steer(model, marks, heads=HEADS, alpha=0.001):
            expected.append(written(model, marks))
    barrier = threading.Barrier(2, timeout=60)

    def job(marks):
        found = []
        for _ in range(8):
            with steer(model, marks, heads=HEADS, alpha=0.001):
                barrier.wait()  # both blocks are open
                found.append(written(model, marks))
                barrier.wait()
        return found

    for texts, right in zip(in_threads(*[lambda marks=marks: job(marks) for marks in pair]), expected, strict=True):
        assert not isinstance(texts, Exception), texts
        assert all(torch.equal(text, right) for text in texts)
    assert not torch.equal(*expected)
    assert clean(model)


def test_a_thread_without_a_block_gets_the_plain_model_unless_it_reads_the_prompts():
    model, marks, other = tiny_model("llama").model, marks_of(5), marks_of(5, seed=1)
    plain, plain_other = written(model, marks), written(model, other)
    with steer(model, marks, heads=HEADS, alpha=0.001):
        steered = written(model, marks)
        found = in_threads(lambda: written(model, other))[0]
        assert torch.equal(found, plain_other)
        assert torch.equal(in_threads(lambda: written(model, marks))[0], steered)  # as a streamer's thread does
        # One thread, first the prompts, then something else, one token at a time too.
        one = Marks(
            other.input_ids[:, :1], *(getattr(other, name)[:, :1] for name in ("attention_mask", "marked", "strength"))
        )
        assert torch.equal(in_threads(lambda: (written(model, marks), written(model, one)))[0][1], _plain(one))
        with pytest.raises(ConfigError, match="other tokens"):
            written(model, other)
    assert not torch.equal(steered, plain)
    assert torch.equal(written(model, marks), plain)


def _plain(marks):
    return written(tiny_model("llama").model, marks)


def test_what_a_thread_was_writing_when_a_block_opened_stays_plain():
    model, marks, other = tiny_model("llama").model, marks_of(5), marks_of(5, seed=1)
    expected, reached, opened = written(model, other), threading.Event(), threading.Event()

    def pause(ids, scores):
        if ids.shape[1] == 26:
            reached.set()
            opened.wait(60)
        return scores

    found = []
    thread = threading.Thread(
        target=lambda: found.append(model.generate(**other.inputs, **OPTIONS, logits_processor=[pause]))
    )
    thread.start()
    reached.wait(60)
    with steer(model, marks, heads=HEADS, alpha=0.001):
        opened.set()
        thread.join()
    assert torch.equal(found[0], expected)


def test_a_picture_of_attention_is_that_of_its_own_thread():
    model, marks, other = tiny_model("llama").model, marks_of(5), marks_of(5, seed=1)
    expected = attention_mass(model, marks)
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            model(**other.inputs)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(10):
            assert torch.allclose(attention_mass(model, marks), expected, atol=1e-6)
    finally:
        stop.set()
        thread.join()


def test_blocks_left_out_of_order_leave_nothing_behind():
    model, marks, other = tiny_model("llama").model, marks_of(5), marks_of(14)
    plain = written(model, marks)
    with steer(model, other, heads=HEADS):
        expected = written(model, other)
    for blocks in (
        [steer(model, marks, heads=HEADS), steer(model, other, heads=HEADS)],
        [installed(model), steer(model, other, heads=HEADS)],
    ):
        for block in blocks:
            block.__enter__()
        blocks[0].__exit__(None, None, None)
        assert torch.equal(written(model, other), expected)  # the second block is in force, and alone
        blocks[1].__exit__(None, None, None)
        assert clean(model)
    assert torch.equal(written(model, marks), plain)


def test_an_implementation_set_within_a_block_is_refused_and_stays():
    model, marks = tiny_model("llama").model, marks_of(5)
    with steer(model, marks, heads=HEADS):
        model.set_attn_implementation("eager")
        with pytest.raises(ModelError, match="set to 'eager' within a block"):
            model(**marks.inputs)
        with pytest.raises(ModelError, match="set to 'eager' within a block"):
            steer(model, marks, heads=HEADS).__enter__()
    assert clean(model, "eager")


@pytest.mark.parametrize("kind", ["llama", "converted"])
def test_a_lost_mask_function_is_put_back_or_missed(kind):
    """Without it transformers makes no mask at all: padding is read, and so is the future where nothing is cached."""
    model, marks = tiny_model("llama").model, marks_of(5)
    if kind == "converted":
        masformer.convert(model, full_layers=[0], span=AttentionWindow("sliding", 16))
    with steer(model, marks, heads=HEADS):
        expected = model(**marks.inputs).logits
    name = "tenfold_span" if kind == "converted" else "tenfold_sdpa"
    masks = AttentionMaskInterface._global_mapping
    kept = masks.pop(name)
    try:
        if kind == "converted":
            with pytest.raises(ModelError, match="mask function of tenfold_span is missing"):
                model(**marks.inputs)
        with steer(model, marks, heads=HEADS):
            assert torch.equal(model(**marks.inputs).logits, expected)
            del masks[name]
            with pytest.raises(ModelError, match=f"mask function of {name} is missing"):
                model(**marks.inputs)
    finally:
        masks[name] = kept
