import pytest
from networks import Network


@pytest.fixture
def network():
    return Network()
