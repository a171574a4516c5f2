"""Each test of this folder runs twice: on the CPU with all others, to prove its code, and on CUDA (``make gpu``)."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def away():
    """How far a result lies from one in float64, ``|found - exact| / |exact|``; NaN where either is none."""

    def distance(found, exact):
        found, exact = (part.detach().double().cpu() for part in (found, exact))
        return float((found - exact).norm() / exact.norm())

    return distance
