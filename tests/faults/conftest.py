import pytest
from process_faults import end_all


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    yield
    end_all()
