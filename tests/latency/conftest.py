import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """No chip that an earlier test calibrated."""
    monkeypatch.setenv("MLX_OPTIQ_EXT_CACHE", str(tmp_path / "cache"))
