import pytest

import mlx_optiq_hooks


@pytest.fixture
def fresh_gate():
    """Lets the gate judge anew, and again after the test."""
    mlx_optiq_hooks.gate.cache_clear()
    yield
    mlx_optiq_hooks.gate.cache_clear()
