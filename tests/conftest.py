"""Options, markers and fixtures of the whole suite."""

import os
from pathlib import Path

import hypothesis
import pytest


def pytest_addoption(parser):
    parser.addoption("--clips", metavar="DIR", help="a folder of real clips; tests that want one skip without")
    parser.addoption("--matrix", metavar="FILE", help="write the families' table, of what test_families.py found")
    parser.addoption("--all", action="store_true", help="also the tests marked large; ten times the examples")


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes long; runs with --all only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "numeric: compares what is rounded; test-all runs it by every instruction set")
    # A merge is judged by the same examples each time, as Hypothesis itself does where CI is set; other runs draw anew.
    same = bool(os.environ.get("CI"))
    for name, examples in (("default", 25), ("all", 250)):
        hypothesis.settings.register_profile(name, max_examples=examples, deadline=None, derandomize=same)
    # One thread: the tests' tensors are tiny, and threads that wait for each other on a busy machine cost tenfold.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not _has_cuda():  # kernels run on CPU tensors then, in Triton's interpreter
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("--matrix"):
        from tests.support.matrix import Results

        config.pluginmanager.register(Results(), "matrix")
    hypothesis.settings.load_profile("all" if config.getoption("--all") else "default")


def pytest_sessionfinish(session):
    results = session.config.pluginmanager.get_plugin("matrix")
    if results is not None and not hasattr(session.config, "workerinput"):  # not in a worker of xdist
        from tests.support.matrix import page

        Path(session.config.getoption("--matrix")).write_text(page(results))


def pytest_collection_modifyitems(config, items):
    # By marker and not by keyword: a parameter named "large" is a keyword too.
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(pytest.mark.skip(reason="large: runs with --all"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def clips(request) -> Path:
    """The folder of real clips given by --clips."""
    folder = request.config.getoption("--clips")
    if folder is None:
        pytest.skip("needs real clips: --clips DIR")
    if not Path(folder).is_dir():
        pytest.fail(f"--clips: no such folder: {folder}")
    return Path(folder).resolve()
