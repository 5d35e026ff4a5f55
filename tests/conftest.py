"""What every test starts from."""

import fcntl
import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from documented import install_wheel
from hypothesis import HealthCheck, settings
from ready import ready_python

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many workers as cores: threads of theirs wait in turn
settings.register_profile("steps", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # an example is a step
settings.load_profile("steps")
TESTS = Path(__file__).parent
KERNELS = TESTS / "fixtures" / "kernels"
# Long ones, many of them beside a process that has PyTorch loaded (`ready`)
FIRST = ("house/test_documented", "measuring/", "campaign/", "microbench/", "calibration/", "passes/", "tracing/test_r")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first: one that began last would run alone, and every worker would make what they share."""
    items.sort(key=lambda item: not item.path.relative_to(TESTS).as_posix().startswith(FIRST))


TURN, RUNNING = os.open(TESTS, os.O_RDONLY), os.open(__file__, os.O_RDONLY)  # whose locks the workers share


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test marked `alone` measures this machine: no other worker runs one beside it.

    Who waits to be alone keeps the turn, so that nobody begins before it; others pass it on at once.
    """
    fcntl.flock(TURN, fcntl.LOCK_EX)
    fcntl.flock(RUNNING, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
    fcntl.flock(TURN, fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        fcntl.flock(RUNNING, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _no_calibration_of_this_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody calibrated here is theirs: no test may see it or write beside it."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path_factory.getbasetemp() / "home"))


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays() -> None:
    """No search for garbage walks what imports, collection and earlier files left: half a second and more each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model hub cannot be reached, and nothing of it is on this machine."""
    if find_spec("huggingface_hub"):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the project's wheel is installed, and nothing else."""
    pytest.importorskip("hatchling")
    return install_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def ready() -> Iterator[list[str]]:
    """A Python for other processes that has PyTorch loaded."""
    with ready_python() as python:
        yield python


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kernel times that others published (`fixtures/kernels`), as the folder of measurements that fits read."""
    pd = pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("kernels")
    for path in KERNELS.glob("*.csv"):
        rows = pd.read_csv(path)
        if path.stem == "kernels_liger":
            rows.to_csv(folder / path.name, index=False)
        else:
            rows.to_parquet(folder / f"{path.stem}.parquet")
    return folder
