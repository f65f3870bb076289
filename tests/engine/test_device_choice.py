"""The device that a config selects on machines with GPUs, which stand-ins of torch's own queries describe."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.engine import device as device_module
from bge_rerank_integrations.engine.cuda.support import has_kernels, kernel_obstacle
from bge_rerank_integrations.engine.describe import describe_machine
from bge_rerank_integrations.engine.device import choose_device, resolve_device
from bge_rerank_integrations.errors import DeviceError
from bge_rerank_integrations.runtime import warn_once

CURRENT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
AUTO = ScorerConfig()


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(warn_once, "_logged", {})
    device_module._mps_obstacle.cache_clear()
    yield
    device_module._mps_obstacle.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one Tesla P40."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CURRENT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P40")
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (CURRENT, (7, 5), True),
        (CURRENT, (8, 9), True),
        (CURRENT, (9, 0), True),
        (CURRENT, (12, 1), True),
        (CURRENT, (6, 1), False),
        (CURRENT, (7, 0), False),
        (CURRENT, (11, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_86", "compute_86"], (12, 0), True),
        (["sm_86", "compute_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_90a"], (10, 0), False),
        (["compute_100f"], (12, 0), False),
        (["other"], (9, 0), False),
    ],
)
def test_code_runs_on_the_devices_that_cuda_allows(
    architectures: list[str], capability: tuple[int, int], expected: bool
) -> None:
    assert has_kernels(architectures, capability) is expected


def test_auto_leaves_a_gpu_without_kernels_for_the_cpu_with_one_log_line(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "bge_rerank_integrations.engine.device"):
        assert resolve_device(AUTO) == torch.device("cpu")
        assert resolve_device(AUTO) == torch.device("cpu")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "selects the CPU instead of cuda:0" in line
    assert "no kernels for 'Tesla P40' of compute capability 6.1" in line
    assert "\n" not in line
    report = describe_machine(AUTO)
    assert (report.device, report.dtype) == ("cpu", "float32")
    assert "Tesla P40" in report.device_reason


@pytest.mark.parametrize(
    ("capability", "advice"),
    [((6, 1), "a build of torch for an older CUDA version"), ((13, 0), "a newer build of torch")],
)
def test_a_gpu_without_kernels_is_refused_by_name_with_what_to_install(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], advice: str
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(DeviceError, match=f"device 'cuda' cannot be used: .* install {advice}"):
        resolve_device(ScorerConfig(device="cuda"))
    with pytest.raises(DeviceError, match="sees 1 CUDA device"):
        resolve_device(ScorerConfig(device="cuda:1"))


@pytest.mark.parametrize(
    ("architectures", "hip"), [(["sm_61", "sm_75"], None), (["compute_60"], None), ([], None), (["gfx942"], "6.4")]
)  # fmt: skip
def test_a_gpu_with_kernels_is_used(
    gpu: pytest.MonkeyPatch, architectures: list[str], hip: str | None
) -> None:
    gpu.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    gpu.setattr(torch.version, "hip", hip)
    assert kernel_obstacle(torch.device("cuda", 0)) is None
    assert resolve_device(AUTO) == resolve_device(ScorerConfig(device="cuda")) == torch.device("cuda", 0)
    assert choose_device().reason == "the current CUDA device"


def test_an_mps_device_with_wrong_attention_is_left_for_the_cpu_and_refused_by_name(
    mac: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[tuple[torch.device, int]] = []

    def refuse(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        tried.append((device, head_dim))
        raise DeviceError("attention is wrong")

    mac.setattr(device_module, "resolve_attention", refuse)
    assert resolve_device(AUTO) == resolve_device(AUTO) == torch.device("cpu")
    assert "selects the CPU instead of mps: attention is wrong" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(DeviceError, match="device 'mps' cannot be used: attention is wrong"):
        resolve_device(ScorerConfig(device="mps"))
    assert tried == [(torch.device("mps"), 64)], "one trial per process, with the heads of BGE models"


def test_an_mps_device_with_right_attention_is_used(mac: pytest.MonkeyPatch) -> None:
    mac.setattr(device_module, "resolve_attention", lambda *_: None)
    assert resolve_device(AUTO) == resolve_device(ScorerConfig(device="mps")) == torch.device("mps")
    assert choose_device().reason == "no CUDA device is available, but MPS is"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_mps_is_refused_where_it_does_not_exist() -> None:
    with pytest.raises(DeviceError, match="'mps' is not available on this machine"):
        resolve_device(ScorerConfig(device="mps"))
