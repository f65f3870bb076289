"""No request body gives a status of 500 or above."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from bge_rerank_integrations.server import ServerSettings, create_app
from bge_rerank_integrations.server.dialects.table import DIALECTS
from tests.support.servers import HeldScorer

NAMES = sorted({name for dialects in DIALECTS.values() for dialect in dialects for name in dialect.fields})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["true", "false", "0", "NONE", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["text", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)
TEXTS = st.text(max_size=10)
TEXT_LISTS = st.lists(TEXTS | st.fixed_dictionaries({"text": TEXTS}), max_size=4)
# Values often have the right types, so that some requests reach the scorer.
OBJECTS = st.fixed_dictionaries(
    {},
    optional={name: VALUES | TEXTS | TEXT_LISTS | st.lists(st.tuples(TEXTS, TEXT_LISTS)) for name in NAMES},
)
PATHS = st.sampled_from(sorted(DIALECTS))
FUZZ = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app: Any = create_app(HeldScorer(is_held=False), ServerSettings(max_body_mib=0.01))  # type: ignore[arg-type]
    with TestClient(app) as client:
        yield client


def check(response: Any) -> None:
    assert response.status_code == 200 or 400 <= response.status_code < 500
    answer = response.json()
    if response.status_code != 200:
        assert {"message", "detail", "error", "error_type", "type"} <= set(answer)


@FUZZ
@given(path=PATHS, body=OBJECTS)
def test_objects(path: str, body: dict[str, Any], client: TestClient) -> None:
    check(client.post(path, content=json.dumps(body)))


@FUZZ
@given(
    path=PATHS,
    content=st.binary(max_size=60) | VALUES.map(json.dumps).map(str.encode),
    encoding=st.sampled_from(["", "gzip", "deflate", "identity", "br"]),
)
def test_bytes(path: str, content: bytes, encoding: str, client: TestClient) -> None:
    check(client.post(path, content=content, headers={"content-encoding": encoding} if encoding else {}))
