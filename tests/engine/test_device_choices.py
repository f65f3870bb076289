"""The defaults that depend on the machine: the number of threads and the precision."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bge_rerank_integrations import ConfigError, ScorerConfig
from bge_rerank_integrations.engine.checkpoint.model_config import read_shape
from bge_rerank_integrations.engine.cpu.amx import has_amx
from bge_rerank_integrations.engine.cpu.cores import UsableCores, cpu_quota, usable_cores
from bge_rerank_integrations.engine.cpu.onednn_limit import allows_amx, allows_pairs
from bge_rerank_integrations.engine.device import (
    default_threads,
    resolve_dtype,
    resolve_precision,
    resolve_threads,
)
from bge_rerank_integrations.engine.runner import load_runner

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
V1_MOUNT = "33 31 0:30 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "40 31 0:38 {root} {point} rw - cgroup2 cgroup2 rw,nsdelegate"
OTHER_MOUNTS = (
    "22 1 254:0 / / rw - ext4 /dev/vda rw\n36 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def fake_machine(
    root: Path, *, groups: str, mounts: str, quotas: dict[str, str], mount_point: str = "/sys/fs/cgroup"
) -> Path:
    """Write the files that a process sees. `quotas` maps paths below the mount point to their contents."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(OTHER_MOUNTS + mounts + "\n")
    for name, text in quotas.items():
        path = root / mount_point.lstrip("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v2(root: Path, group: str, quotas: dict[str, str], *, mount_root: str = "/") -> Path:
    mount = V2_MOUNT.format(root=mount_root, point="/sys/fs/cgroup")
    return fake_machine(root, groups=f"0::{group}\n", mounts=mount, quotas=quotas)


def v1(root: Path, group: str, quotas: dict[str, tuple[int, int]], *, mount_root: str = "/") -> Path:
    point = "/sys/fs/cgroup/cpu,cpuacct"
    return fake_machine(
        root,
        groups=f"5:memory:{group}\n4:cpu,cpuacct:{group}\n3:cpuset:/\n0::/\n",
        mounts=V1_MOUNT.format(root=mount_root, point=point),
        mount_point=point,
        quotas={
            f"{folder}/{name}": str(value)
            for folder, (quota, period) in quotas.items()
            for name, value in (("cpu.cfs_quota_us", quota), ("cpu.cfs_period_us", period))
        },
    )


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2.0),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "0 0"}, None),
        ({"cpu.max": "not a number"}, None),
    ],
)
def test_the_quota_of_a_container_that_is_the_root_of_its_namespace(
    tmp_path: Path, quotas: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(v2(tmp_path, "/", quotas)) == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"a/cpu.max": "800000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "300000 100000"}, 3.0),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000", "a/b/c/cpu.max": "max 100000"}, 0.5),
        ({"a/cpu.max": "200000 100000", "a/b/c/cpu.max": "300000 100000"}, 2.0),
        ({"a/cpu.max": "max 100000", "a/b/c/cpu.max": "max 100000"}, None),
        ({"a/b/c/d/cpu.max": "100000 100000", "other/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_lowest_quota_of_the_group_and_its_parents_counts(
    tmp_path: Path, quotas: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(v2(tmp_path, "/a/b/c", quotas)) == expected


def test_a_group_below_the_root_of_the_mount_is_found_there(tmp_path: Path) -> None:
    quotas = {"cpu.max": "600000 100000", "pod/cpu.max": "250000 100000", "kube/pod/cpu.max": "100000 100000"}
    assert cpu_quota(v2(tmp_path, "/kube/pod", quotas, mount_root="/kube")) == 2.5


@pytest.mark.parametrize("group", ["/../outside", "/elsewhere"])
def test_of_a_group_that_is_not_mounted_only_the_mount_point_counts(tmp_path: Path, group: str) -> None:
    mount_root = "/" if ".." in group else "/container"
    quotas = {"cpu.max": "400000 100000", "outside/cpu.max": "100000 100000"}
    assert cpu_quota(v2(tmp_path, group, quotas, mount_root=mount_root)) == 4.0


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({".": (-1, 100_000), "docker": (-1, 100_000), "docker/x": (200_000, 100_000)}, 2.0),
        ({".": (-1, 100_000), "docker": (125_000, 50_000), "docker/x": (-1, 100_000)}, 2.5),
        ({".": (-1, 100_000), "docker": (-1, 100_000), "docker/x": (-1, 100_000)}, None),
        ({".": (-1, 100_000), "docker/x": (100_000, 0)}, None),
    ],
)
def test_the_quota_of_version_1(
    tmp_path: Path, quotas: dict[str, tuple[int, int]], expected: float | None
) -> None:
    assert cpu_quota(v1(tmp_path, "/docker/x", quotas)) == expected


def test_the_quota_of_version_1_where_the_container_is_the_root_of_the_mount(tmp_path: Path) -> None:
    assert cpu_quota(v1(tmp_path, "/docker/x", {".": (300_000, 100_000)}, mount_root="/docker/x")) == 3.0


def test_a_machine_with_both_versions_obeys_the_lower_quota(tmp_path: Path) -> None:
    mounts = "\n".join(
        (
            V1_MOUNT.format(root="/", point="/sys/fs/cgroup/cpu"),
            V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified"),
        )
    )
    quotas = {
        "cpu/a/cpu.cfs_quota_us": "300000",
        "cpu/a/cpu.cfs_period_us": "100000",
        "unified/b/cpu.max": "200000 100000",
    }
    root = fake_machine(tmp_path, groups="4:cpu:/a\n0::/b\n", mounts=mounts, quotas=quotas)
    assert cpu_quota(root) == 2.0


def test_names_with_spaces_and_colons_are_read(tmp_path: Path) -> None:
    mount = V2_MOUNT.format(root="/", point=r"/my\040cgroups")
    root = fake_machine(
        tmp_path,
        groups="0::/a:b c\n",
        mounts=mount,
        mount_point="/my cgroups",
        quotas={"a:b c/cpu.max": "200000 100000"},
    )
    assert cpu_quota(root) == 2.0


@pytest.mark.parametrize("line", ["", "25 1 - cgroup2 cgroup2 rw", "25 1 0:22 / /sys/fs/cgroup - cgroup"])
def test_a_line_that_is_too_short_is_no_mount(tmp_path: Path, line: str) -> None:
    mount = V2_MOUNT.format(root="/", point="/sys/fs/cgroup")
    quotas = {"cpu.max": "200000 100000"}
    assert cpu_quota(fake_machine(tmp_path, groups="0::/\n", mounts=f"{line}\n{mount}", quotas=quotas)) == 2.0


def test_a_machine_without_cgroups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert usable_cores(tmp_path).num_cores >= 1


@pytest.mark.parametrize(("quota", "count"), [("10000", 1), ("99999", 1), ("1", 1)])
def test_a_small_quota_is_one_core(tmp_path: Path, quota: str, count: int) -> None:
    cores = usable_cores(v2(tmp_path, "/", {"cpu.max": f"{quota} 100000"}))
    assert cores.num_cores == count
    if (os.cpu_count() or 1) > 1:
        assert cores.limited_by == "the CPU quota of the cgroup"


def test_a_quota_above_the_number_of_cores_changes_nothing(tmp_path: Path) -> None:
    free = usable_cores(tmp_path / "without cgroups")
    assert usable_cores(v2(tmp_path / "with", "/", {"cpu.max": "900000000 100000"})) == free


def test_a_quota_of_2_of_64_cores_gives_2_threads() -> None:
    limited = UsableCores(2, "the CPU quota of the cgroup")
    assert default_threads(64, limited) == (2, "the CPU quota of the cgroup")
    assert default_threads(1, limited) == (1, "torch's choice"), "torch was told to use fewer"
    assert default_threads(64, UsableCores(64, None)) == (64, "torch's choice")
    assert default_threads(8, UsableCores(4, None)) == (8, "torch's choice"), "more threads than cores"


def test_num_threads_overrides_every_limit() -> None:
    assert resolve_threads(ScorerConfig(num_threads=999)) == (999, "chosen")


CHILD_WITH_ONE_CORE = """
import os, sys, threading
import torch
torch.set_num_threads(4)
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.describe import describe_machine

seen = set()
gelu = torch.nn.functional.gelu
def watched(*args, **kwargs):
    seen.add(torch.get_num_threads())
    return gelu(*args, **kwargs)
torch.nn.functional.gelu = watched
with Scorer(sys.argv[1], device="cpu", dtype="float32") as scorer:
    scorer.score([("a query", f"passage {number}") for number in range(8)])
machine = describe_machine(ScorerConfig(model=sys.argv[1], device="cpu"))
print(seen, machine.threads, machine.threads_reason, torch.get_num_threads())
print([thread.name for thread in threading.enumerate() if "bge-rerank-cpu" in thread.name])
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2,
    reason="needs a system with CPU affinity, and two cores",
)
def test_a_process_bound_to_one_core_computes_with_one_thread(checkpoint: Path) -> None:
    command = [sys.executable, "-c", CHILD_WITH_ONE_CORE, str(checkpoint)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    summary, threads = run.stdout.splitlines()
    assert summary == "{1} 1 the CPU affinity of the process 4"
    assert threads == "[]", "one thread needs no helpers"


@pytest.mark.parametrize(
    ("device", "amx", "dtype", "reason"),
    [
        (CPU, True, torch.bfloat16, "default on a CPU with AMX"),
        (CPU, False, torch.float32, "default on a CPU without AMX"),
        (CUDA, True, torch.float16, "default on cuda"),
        (CUDA, False, torch.float16, "default on cuda"),
        (MPS, True, torch.float32, "default on mps"),
    ],
)
def test_auto_is_a_fast_precision_of_the_device(
    device: torch.device, amx: bool, dtype: torch.dtype, reason: str
) -> None:
    assert resolve_precision(ScorerConfig(), device, has_amx=lambda: amx) == (dtype, reason)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_chosen_precision_does_not_depend_on_amx(amx: bool, dtype: str) -> None:
    config = ScorerConfig(dtype=dtype)  # type: ignore[arg-type]
    assert resolve_precision(config, CPU, has_amx=lambda: amx) == (getattr(torch, dtype), "chosen")


def test_float16_stays_refused_on_a_cpu_with_amx() -> None:
    with pytest.raises(ConfigError, match="float16"):
        resolve_precision(ScorerConfig(dtype="float16"), CPU, has_amx=lambda: True)


def test_auto_follows_this_machine() -> None:
    assert resolve_dtype(ScorerConfig(), CPU) is (torch.bfloat16 if has_amx() else torch.float32)


@pytest.mark.parametrize(
    ("environment", "amx", "pairs"),
    [
        ({}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": ""}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "no such instructions"}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "avx10_1_512_amx_fp16"}, True, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False, True),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_fp16"}, False, True),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI_2"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, False, False),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX", "DNNL_MAX_CPU_ISA": "AVX2"}, True, True),
    ],
)
def test_a_limit_of_onednn_can_exclude_instructions(
    environment: dict[str, str], amx: bool, pairs: bool
) -> None:
    assert allows_amx(environment) is amx
    assert allows_pairs(environment) is pairs


def test_a_process_whose_limit_excludes_amx_has_none() -> None:
    code = "from bge_rerank_integrations.engine.cpu.amx import has_amx; print(has_amx())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "False"


def test_loading_logs_the_precision_and_the_reason(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ScorerConfig(device="cpu", max_batch_tokens=778)  # a budget that no other test uses
    with caplog.at_level(logging.INFO, logger="bge_rerank_integrations.engine.build"):
        load_runner(config, checkpoint, read_shape(checkpoint))
    dtype, reason = resolve_precision(config, CPU)
    assert [record.getMessage() for record in caplog.records] == [f"precision on cpu: {dtype} ({reason})"]
