"""The stage `generate` hands on what it is told."""

import pytest

from tenfold import cli
from tenfold.engines import stage
from tenfold.engines.session import Session


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--alpha", "0.2", "--keep-sink", "--generated", "scale"], (0.2, None, "scale", True)),
        (["--target-mass", "0.3"], ("auto", 0.3, "keep", False)),
    ],
)
def test_every_key_of_the_emphasis_reaches_the_session(monkeypatch, tmp_path, flags, expected):
    given = []

    def noted(*arguments, **keys):
        given.append(tuple(keys[key] for key in ("alpha", "target_mass", "generated", "keep_sink")))
        return Session(*arguments, **keys)

    monkeypatch.setattr(stage, "Session", noted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads.json").write_text('{"0": [0, 1]}')
    command = ["generate", "tiny:llama", "--prompts", "a b c", "--emphasise", "b", "--profile", "heads.json"]
    assert cli.main([*command, *flags, "--max-new-tokens", "2", "--out", "run"]) == 0
    assert set(given) == {expected}
