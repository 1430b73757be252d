import pytest
import torch

from isheep_kernels import cpu


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small here: on a busy machine, waiting for a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpp", "torch"])
def backend(request, monkeypatch):
    """Runs a test with the C++ kernels, then with torch's definitions."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "serves", lambda x: False)
    elif cpu.library() is None:
        pytest.skip("no C++ compiler here")
    return request.param
