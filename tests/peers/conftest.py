import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs torch on one thread: on such small matrices a second one only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
