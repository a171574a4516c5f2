"""From tasks to a profile."""

import pytest

from tenfold.attend.pasta import profiling
from tenfold.attend.pasta.heads import batches_of, effects
from tenfold.attend.pasta.profiles import load_profile, save_profile
from tenfold.attend.pasta.profiling import choose_size, find_profile
from tenfold.attend.pasta.tasks import conflict_items, evidence_items
from tenfold.errors import ConfigError
from tenfold.models.tiny import tiny_model
from tenfold.stage.store import Store

TASKS = {
    "conflict": (conflict_items(4), conflict_items(4, seed=1)),
    "evidence": (evidence_items(4), evidence_items(4, seed=1)),
}


def found(**options):
    opened = tiny_model("llama", num_hidden_layers=3)
    keys = {"sizes": [1, 3, 6], "min_fluency": 0.0, **options}
    return find_profile(opened.model, opened.tokenizer, TASKS, **keys), opened


def test_exhaustive_search_takes_the_best_head_of_a_single_task():
    opened = tiny_model("llama", num_hidden_layers=3)
    single = {"conflict": TASKS["conflict"]}
    profile = find_profile(opened.model, opened.tokenizer, single, sizes=[1], shortlist=1.0, min_fluency=0)
    batches = batches_of(opened.model, opened.tokenizer, conflict_items(4))
    change = effects(opened.model, batches, [(layer, head) for layer in range(3) for head in range(4)])
    best = max(change, key=change.get)
    assert profile.heads == {best[0]: (best[1],)}


def test_profile_says_where_it_comes_from_and_reads_back(tmp_path):
    profile, opened = found(provenance={"source": "tiny:llama"})
    assert profile.tasks == ("conflict", "evidence")
    assert profile.provenance["source"] == "tiny:llama"
    assert profile.provenance["alpha"] == 0.01
    assert profile.curve[0]["heads"] == 0
    assert profile.size in [point["heads"] for point in profile.curve[1:]]
    again = load_profile(save_profile(profile, tmp_path / "p.json"))
    assert again == profile
    again.check_model(opened.model)


def test_interrupted_it_goes_on_and_finds_the_same(tmp_path, monkeypatch):
    whole, _ = found(store=None)
    calls = []
    real = profiling._point

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(profiling, "_point", stop)
        with pytest.raises(KeyboardInterrupt):
            found(store=Store(tmp_path / "store.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(profiling, "effects", lambda *_, **__: pytest.fail("measured again"))
        again, _ = found(store=Store(tmp_path / "store.jsonl"))
    assert (again.heads, again.curve) == (whole.heads, whole.curve)


def test_the_choice_is_the_best_score_among_fluent_sets():
    points = [
        {"heads": n, "score": s, "stderr": 0.0, "fluency": f}
        for n, s, f in [(0, 0.9, 4), (4, 0.5, 4), (8, 0.7, 3.7), (16, 1, 1)]
    ]
    assert choose_size(points, 0.9)["heads"] == 8
    assert choose_size([{**point, "stderr": 0.3} for point in points], 0.9)["heads"] == 4
    assert choose_size(points, 0.0)["heads"] == 16
    with pytest.raises(ConfigError, match="min_fluency"):
        choose_size([points[0], points[3]], 0.9)


def test_what_was_kept_for_another_search_is_not_used(tmp_path):
    first, _ = found(store=Store(tmp_path / "store.jsonl"))
    other, _ = found(store=Store(tmp_path / "store.jsonl"), alpha=0.5)
    fresh, _ = found(alpha=0.5)
    assert other.curve == fresh.curve != first.curve


def test_heads_that_were_not_measured_exactly_are_never_chosen(monkeypatch):
    measured = []
    real = profiling.effects

    def watch(model, batches, heads, **options):
        measured.append(set(heads))
        return {head: -float(head[1]) for head in real(model, batches, heads, **options)}

    monkeypatch.setattr(profiling, "effects", watch)
    profile, _ = found(shortlist=0.5, sizes=[2])
    assert measured[0] == measured[1]
    assert len(measured[0]) >= 6
    chosen = {(layer, head) for layer, heads in profile.heads.items() for head in heads}
    assert chosen <= measured[0]
    assert max(head for _, head in chosen) <= sorted(head for _, head in measured[0])[len(chosen) - 1]


def test_impossible_searches_are_refused():
    opened = tiny_model("llama")
    with pytest.raises(ConfigError, match="tasks"):
        find_profile(opened.model, opened.tokenizer, {})
    with pytest.raises(ConfigError, match="sizes"):
        find_profile(opened.model, opened.tokenizer, TASKS, sizes=[100], shortlist=0.5)
