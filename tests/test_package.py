"""The package as a whole: light to import, documented, nothing changed by importing it."""

import subprocess
import sys
import time

import pytest

import tenfold


def test_importing_loads_nothing_heavy():
    code = "import sys, tenfold; sys.exit(bool({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.timing
def test_importing_is_quick():
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tenfold"], check=True)
    assert time.perf_counter() - began < 0.5


def test_every_public_name_resolves_and_is_documented():
    for name in tenfold.__all__:
        if name != "__version__":
            assert getattr(tenfold, name).__doc__


def test_unknown_names_are_attribute_errors():
    assert not hasattr(tenfold, "nothing")
    assert set(tenfold.__all__) <= set(dir(tenfold))
