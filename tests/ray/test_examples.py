"""The examples that run on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra `ray`")

import pyarrow.parquet as pq
from ray import serve

from examples import ray_batch, ray_serve_langchain

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_batch_over_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sample", str(tmp_path / "in"), str(tmp_path / "out"), "--top-n", "2"]
    assert ray_batch.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(len(rows)))
    assert f"{len(rows)} rows" in printed
    assert "0 with an error" in printed
    assert all(len(row["indices"]) == 2 for row in rows)
    assert ray_batch.main(arguments[1:]) == 0
    assert len(pq.read_table(tmp_path / "out")) == len(rows)


def test_a_langchain_app_on_serve(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert ray_serve_langchain.main(["What do giant pandas eat?", "--num-replicas", "1"]) == 0
    finally:
        serve.shutdown()  # other tests start Serve on a port of their own
    first, *others = [line for line in capsys.readouterr().out.splitlines() if line.endswith("...")]
    assert "giant panda" in first.lower()
    assert len(others) == 2
