import pytest

from isheep_kernels import cpu


@pytest.fixture(params=["cpp", "torch"])
def backend(request, monkeypatch):
    """Runs a test with the C++ kernels, then with torch's definitions."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "serves", lambda x: False)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param
