"""Damaged and hostile checkpoints are refused, and none of their code runs."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import CheckpointError
from tests.stress.common import Bench, check, read_tensors


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.stress
def test_damaged_and_hostile_checkpoints_are_refused(bench: Bench) -> None:
    folder = Path(shutil.copytree(bench.checkpoint, bench.folder / "damaged"))
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    rng = random.Random(9)
    count = 25
    pinned = [_is_refused(folder, damage, rng, sha256) for damage in [_truncate, _flip_any] * count]
    plain = [_is_refused(folder, damage, rng) for damage in [_truncate, _flip_header, _make_infinite] * count]
    flips = [_is_refused(folder, _flip_weight, rng) for _ in range(2 * count)]
    mark = bench.folder / "executed"
    hostile = [_is_hostile_refused(bench, make, mark) for make in HOSTILE]
    check(
        all(pinned) and all(plain) and all(hostile) and not mark.exists(),
        f"refused: with sha256, {sum(pinned)} of {len(pinned)} damaged files; without it, {sum(plain)} of "
        f"{len(plain)} files that were truncated, had a damaged header or were not finite; {sum(hostile)} "
        f"of {len(hostile)} hostile checkpoints; {int(mark.exists())} canaries executed. With one bit of a "
        f"weight flipped and no sha256, {len(flips) - sum(flips)} of {len(flips)} files stay finite and load",
    )


def _is_refused(
    folder: Path,
    damage: Callable[[bytes, random.Random], bytes],
    rng: random.Random,
    sha256: str | None = None,
) -> bool:
    path = folder / "model.safetensors"
    intact = path.read_bytes()
    path.write_bytes(damage(intact, rng))
    try:
        return _refuses(folder, sha256)
    finally:
        path.write_bytes(intact)


def _refuses(folder: Path, sha256: str | None = None) -> bool:
    try:
        Scorer(folder, device="cpu", sha256=sha256).close()
    except CheckpointError:
        return True
    return False


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip_header(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit in the header where it describes the tensors, after the metadata at its beginning."""
    described = data.index(b"}", 0, _header_end(data)) + 1
    return _flip(data, rng.choice([*range(8), *range(described, _header_end(data))]), rng)


def _flip_any(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.randrange(len(data)), rng)


def _flip_weight(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng.randrange(_header_end(data), len(data)), rng)


def _make_infinite(data: bytes, rng: random.Random) -> bytes:
    """Set all exponent bits of one float32 value, which makes it NaN or infinite."""
    start = _header_end(data)
    at = start + 4 * rng.randrange((len(data) - start) // 4)
    high = int.from_bytes(data[at : at + 4], "little") | 0x7F80_0000
    return data[:at] + high.to_bytes(4, "little") + data[at + 4 :]


def _pickled_bin(folder: Path, canary: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(canary)


def _pickled_pt(folder: Path, canary: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.pt").write_bytes(canary)


def _pickled_safetensors(folder: Path, canary: bytes) -> None:
    (folder / "model.safetensors").write_bytes(canary)


def _pickled_config(folder: Path, canary: bytes) -> None:
    (folder / "config.json").write_bytes(canary)


def _pickled_tokenizer(folder: Path, canary: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(canary)


def _remote_code(folder: Path, canary: bytes) -> None:
    """Add code to the folder, and ask for it with `auto_map`. The model type stays the same."""
    code = f"import pickle\npickle.loads({canary!r})\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    _edit_config(
        folder, auto_map={"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.C"}
    )


def _remote_type(folder: Path, canary: bytes) -> None:
    _remote_code(folder, canary)
    _edit_config(folder, model_type="evil", architectures=["EvilForSequenceClassification"])


def _index_outside(folder: Path, canary: bytes) -> None:
    (folder.parent / "outside.safetensors").write_bytes(canary)
    _write_index(folder, "../outside.safetensors")


def _index_of_pickle(folder: Path, canary: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(canary)
    _write_index(folder, "pytorch_model.bin")


def _endless_header(folder: Path, canary: bytes) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + canary)


HOSTILE: Final = (
    _pickled_bin,
    _pickled_pt,
    _pickled_safetensors,
    _pickled_config,
    _pickled_tokenizer,
    _remote_code,
    _remote_type,
    _index_outside,
    _index_of_pickle,
    _endless_header,
)


def _is_hostile_refused(bench: Bench, make: Callable[[Path, bytes], None], mark: Path) -> bool:
    folder = Path(shutil.copytree(bench.checkpoint, bench.folder / "hostile" / make.__name__))
    make(folder, pickle.dumps(Canary(mark)))
    return _refuses(folder)


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def _write_index(folder: Path, name: str) -> None:
    weight_map = dict.fromkeys(read_tensors(folder), name)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
