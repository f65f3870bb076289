"""A scorer works where gevent has replaced the threads and locks of the standard library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.queues import PATIENCE_S

pytest.importorskip("gevent")

# What a worker of gunicorn or Celery does: it replaces threads before or after it imports the application, and
# then serves each request in a greenlet.
PATCH = "from gevent import monkey; monkey.patch_all()\n"
IMPORTS = "from bge_rerank_integrations import BGEReranker, Scorer\n"
CODE = """
import gevent
import threading

passages = ["A bear sleeps all winter.", "Giant pandas eat bamboo, mostly.", "Pandas live in China."]
query = "what does a giant panda eat?"
options = {"model": "embedded", "device": "cpu", "num_threads": 2}

reranker = BGEReranker(**options, top_n=1)
first = [gevent.spawn(reranker.rerank, passages, query) for _ in range(3)]  # they wait for one model
gevent.joinall(first, raise_error=True)
print([found["index"] for each in first for found in each.value])

scorer = Scorer(**options, dtype="float32")
alone = scorer.rank(query, passages)
beside = [gevent.spawn(scorer.rank, query, passages) for _ in range(20)]
gevent.joinall(beside, raise_error=True)
print(all([p.index for p in each.value] == [p.index for p in alone] for each in beside))
print(max(abs(p.score - q.score) for each in beside for p, q in zip(each.value, alone)) < 1e-5)

many = gevent.spawn(scorer.score, [(query, passage) for passage in passages * 200])
killed = gevent.spawn(scorer.score, [(query, passage) for passage in passages * 200])
gevent.sleep(0)
killed.kill()
print(len(many.get()), scorer.rank(query, passages)[0].index)

scorer.close()
reranker.close()
names = [thread.name for thread in threading.enumerate() if "bge" in thread.name]
# All models of a process share the threads of `engine/cpu/shared_work.py`, which stay.
print(scorer.health().state, [name for name in names if "share" not in name])
"""


@pytest.mark.parametrize("before", [PATCH + IMPORTS, IMPORTS + PATCH], ids=["patch-first", "import-first"])
def test_greenlets_share_a_scorer(before: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + CODE],
        # Some versions of torch start a process, which gevent forks. tokenizers would warn about it.
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert (run.stderr, run.returncode) == ("", 0)
    assert run.stdout.splitlines() == ["[1, 1, 1]", "True", "True", "600 1", "closed []"]
