from __future__ import annotations

import json
import pickle
from collections import UserString
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.errors import ConfigError


def test_defaults_are_those_of_flag_reranker() -> None:
    config = ScorerConfig()
    assert config.model == "BAAI/bge-reranker-base"
    assert (config.max_length, config.effective_query_max_length) == (512, 384)
    assert (config.normalize, config.device, config.dtype) == (False, "auto", "auto")


def test_json_round_trip_and_hash() -> None:
    config = ScorerConfig(
        model="x/y", device="cuda:1", dtype="float16", query_max_length=256, long_passages="windows"
    )
    again = ScorerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert {config: 1}[again] == 1
    assert pickle.loads(pickle.dumps(config)) == config


def test_devices_are_kept_as_a_tuple_and_dumped_as_a_list() -> None:
    config = ScorerConfig(devices=["cuda:0", "cuda:1"], dtype="float16")
    assert config == ScorerConfig(devices=("cuda:0", "cuda:1"), dtype="float16")
    assert config.to_dict()["devices"] == ["cuda:0", "cuda:1"]
    again = ScorerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert {config: 1}[again] == 1
    assert pickle.loads(pickle.dumps(config)) == config


def test_per_device_gives_each_its_own_config() -> None:
    several = ScorerConfig(devices=("cuda:0", "cuda:1"), max_length=256)
    assert several.per_device() == [
        ScorerConfig(device="cuda:0", max_length=256),
        ScorerConfig(device="cuda:1", max_length=256),
    ]
    one = ScorerConfig(device="cpu")
    assert one.per_device() == [one]


def test_paths_are_stored_as_strings() -> None:
    config = ScorerConfig(model=Path("a") / "b", cache_folder=Path("c"))
    assert (config.model, config.cache_folder) == (str(Path("a") / "b"), "c")


def test_immutable_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        ScorerConfig().model = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ScorerConfig("model")  # type: ignore[call-arg]


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"\['batch_size'\]"):
        ScorerConfig.from_dict({"batch_size": 32})
    with pytest.raises(ConfigError, match=r"\[1, 'batch_size'\]"):
        ScorerConfig.from_dict({"batch_size": 32, 1: 2})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="must be a mapping, not list"):
        ScorerConfig.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model must be a non-empty string"),
        ({"model": 3}, "model must be a non-empty string"),
        ({"revision": 3}, "revision must be a string or None"),
        ({"sha256": "abc"}, "sha256 must be 64 lower-case"),
        ({"max_wait_ms": -1}, "max_wait_ms must be a number"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms must be a number"),
        ({"max_queued_tokens": 0}, "max_queued_tokens must be an integer from 1 to"),
        ({"local_files_only": 1}, "local_files_only must be True or False"),
        ({"normalize": "yes"}, "normalize must be True or False"),
        ({"device": "gpu"}, "device must be"),
        ({"device": "cuda:x"}, "device must be"),
        ({"device": "cuda:007"}, "device must be"),
        ({"device": "cuda:\N{ARABIC-INDIC DIGIT THREE}"}, "device must be"),
        ({"devices": ["cuda:0", "cuda:00"]}, r"devices\[1\] must be 'cpu'"),
        ({"dtype": np.array(["auto", "cpu"])}, "dtype must be one of"),
        ({"long_passages": np.array(["truncate"])}, "long_passages must be one of"),
        ({"dtype": UserString("auto")}, "dtype must be one of"),
        ({"devices": []}, "devices must name at least one"),
        ({"devices": ["", ""]}, r"devices\[0\] is empty"),
        ({"devices": ["cuda:0", " "]}, r"devices\[1\] is empty"),
        ({"devices": "cuda:0"}, "devices must be a list of strings"),
        ({"devices": 2}, "devices must be a list of strings"),
        ({"devices": [0, 1]}, "devices must be a list of strings"),
        ({"devices": {"cuda:0", "cuda:1"}}, "devices must be a list of strings"),
        ({"devices": ["auto"]}, "must not contain 'auto'"),
        ({"devices": ["cuda:0", "gpu"]}, "devices must be of one kind"),
        ({"devices": ["gpu0"]}, r"devices\[0\] must be 'cpu'"),
        ({"devices": ["cuda:0", "cpu"]}, "devices must be of one kind"),
        ({"devices": ["cuda:1", "cuda:1"]}, "must not name a device twice"),
        ({"devices": ["cuda", "cuda:0"]}, "must not name a device twice"),
        ({"devices": ["cpu", "cpu:1"]}, "must not name a device twice"),
        ({"devices": ["cuda:0"], "device": "cuda:0"}, "cannot both be given"),
        ({"devices": ["cpu"], "dtype": "float16"}, "not supported on a CPU"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"device": "cpu", "dtype": "float16"}, "not supported on a CPU"),
        ({"device": "cpu:0", "dtype": "float16"}, "not supported on a CPU"),
        ({"long_passages": "split"}, "long_passages must be one of"),
        ({"max_length": 5}, "max_length must be an integer from 6 to"),
        ({"max_length": True}, "max_length must be an integer"),
        ({"max_length": 512.0}, "max_length must be an integer"),
        ({"query_max_length": 0}, "query_max_length must be an integer from 1 to"),
        ({"query_max_length": 508}, "leaves no room for a passage .* at most 507"),
        ({"max_length": 16, "query_max_length": 12}, "leaves no room"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be an integer from 1 to"),
        ({"capture_graphs": 1}, "capture_graphs must be True or False"),
        ({"num_threads": 0}, "num_threads must be an integer from 1 to"),
        ({"num_threads": 100_000}, "num_threads must be an integer from 1 to 1,024"),
        ({"max_length": 65_537}, "max_length must be an integer from 6 to 65,536"),
        ({"query_max_length": 10**6}, "query_max_length must be an integer from 1 to 65,536"),
        ({"max_batch_tokens": 4 * 65_535 + 1}, "max_batch_tokens must be an integer from 1 to 262,140"),
        (
            {"max_queued_tokens": 2**40 + 1},
            "max_queued_tokens must be an integer from 1 to 1,099,511,627,776",
        ),
        ({"window_overlap_tokens": 10**6}, "window_overlap_tokens must be an integer from 0 to 65,536"),
        ({"max_wait_ms": 60_001}, "max_wait_ms must be a number from 0 to 60,000"),
        ({"device": "cuda:128"}, "with N from 0 to 127"),
        ({"device": "cuda:99999999999999999999"}, "with N from 0 to 127"),
        ({"devices": ["cuda:0", "cuda:999"]}, "with N from 0 to 127"),
        ({"model": "embedded", "revision": "main"}, "no revisions"),
        ({"window_overlap_tokens": -1}, "window_overlap_tokens must be an integer from 0 to"),
        ({"query_truncation_side": "middle"}, "query_truncation_side must be one of"),
        ({"blank_passages": "drop"}, "blank_passages must be one of"),
        ({"window_overlap_tokens": 32}, "has no effect while long_passages is 'truncate'"),
        ({"model": "./folder", "revision": "main"}, "local folder, which has no revisions"),
        ({"model": "~/folder", "revision": "main"}, "local folder, which has no revisions"),
        ({"model": "/models/base", "revision": "main"}, "local folder, which has no revisions"),
        ({"long_passages": "windows", "window_overlap_tokens": 124}, "must be less than the 124"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScorerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "mps"},
        {"devices": ["cpu"]},
        {"devices": ("cuda", "cuda:1"), "device": "auto"},
        {"device": "cuda:12", "dtype": "float16"},
        {"query_max_length": 507},
        {"num_threads": 1024, "max_batch_tokens": 4 * 65_535, "max_queued_tokens": 2**40},
        {"device": "cuda:127"},
        {"max_length": 6, "query_max_length": 1},
        *({"max_length": length} for length in range(6, 18)),
        {"max_length": 8192},
        {"long_passages": "windows", "window_overlap_tokens": 123},
        {"query_truncation_side": "left", "blank_passages": "refuse"},
        {"long_passages": "truncate", "window_overlap_tokens": 64},
    ],
)
def test_valid_settings_are_accepted(settings: dict[str, Any]) -> None:
    ScorerConfig(**settings)
