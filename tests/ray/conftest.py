"""A small Ray cluster on this machine that all tests of the folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# More CPUs than a small machine has. They only limit how many processes Ray starts at the same time.
NUM_CPUS = 4
OBJECT_STORE_BYTES = 100 * 1024 * 1024
ENVIRONMENT = {
    # The workers import the package and the tests.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # the token would be written into the user's home
}


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Start Ray on this machine, and stop it after the last test of this folder."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    from ray.data import DataContext

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=NUM_CPUS,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()
