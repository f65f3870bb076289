"""The agents, with models that say what they are told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from llama_index.core.base.llms.types import ToolCallBlock
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.llms.mock import MockFunctionCallingLLM

from examples import langchain_rag, langgraph_agent, llama_index_agent, llama_index_rag
from examples.folder import find_files
from examples.store import ChunkStore
from tests.examples.conftest import Runner

QUESTION = "Which planet is the hottest?"
SEARCH = {"query": QUESTION}


class ScriptedChatModel(FakeMessagesListChatModel):
    """Gives its messages one by one, and remembers its tools and what it was asked."""

    tools: list[Any]
    asked: list[Any]

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, Any]:
        self.tools.extend(tools)
        return self

    def _generate(self, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        self.asked.append(messages)
        return super()._generate(messages, *args, **kwargs)


def script() -> ScriptedChatModel:
    call = {"name": "search_documents", "args": SEARCH, "id": "1", "type": "tool_call"}
    responses: list[BaseMessage] = [AIMessage("", tool_calls=[call]), AIMessage("Venus, says planets.html.")]
    return ScriptedChatModel(responses=responses, tools=[], asked=[])


@pytest.fixture
def langchain_store(tmp_path: Path, folder: Path) -> ChunkStore:
    store = ChunkStore(tmp_path / "langchain")
    store.update(find_files([folder]), langchain_rag.split_file)
    return store


@pytest.fixture
def llama_index_store(tmp_path: Path, folder: Path) -> ChunkStore:
    store = ChunkStore(tmp_path / "llama_index")
    store.update(find_files([folder]), llama_index_rag.split_file)
    return store


def test_a_langgraph_agent_reads_reranked_passages(langchain_store: ChunkStore) -> None:
    llm = script()
    retriever = langchain_rag.make_retriever(langchain_store, langchain_rag.make_reranker("embedded", 2))
    state = langgraph_agent.make_agent(llm, retriever).invoke({"messages": [("user", QUESTION)]})

    tool = llm.tools[0]
    assert isinstance(tool, BaseTool)
    assert tool.name == "search_documents"
    assert list(tool.args) == ["query"]
    [human, call, result, answer] = state["messages"]
    assert isinstance(human, HumanMessage)
    assert call.tool_calls[0]["args"] == SEARCH
    assert isinstance(result, ToolMessage)
    assert str(result.content).startswith("[1] planets.html > Planets > Venus\n")
    assert "relevance_score" in result.artifact[0].metadata
    assert answer.text == "Venus, says planets.html."
    # The second time the model is asked, it sees what the tool returned.
    assert isinstance(llm.asked[1][0], SystemMessage)
    assert llm.asked[1][-1].content == result.content


async def test_a_langgraph_agent_may_run_in_an_event_loop(langchain_store: ChunkStore) -> None:
    retriever = langchain_rag.make_retriever(langchain_store, langchain_rag.make_reranker("embedded", 2))
    agent = langgraph_agent.make_agent(script(), retriever)
    state = await agent.ainvoke({"messages": [("user", QUESTION)]})
    assert state["messages"][-1].text == "Venus, says planets.html."


def test_the_langgraph_agent_runs_from_the_command_line(
    folder: Path, run_main: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(langgraph_agent, "load_llm", lambda name, url: script())
    output = run_main(langgraph_agent, QUESTION, "--folder", folder, "--llm", "scripted:model")
    assert "The agent searched and read\n    1  planets.html > Planets > Venus" in output
    assert output.endswith("Answer: Venus, says planets.html.\n")


Generator = Callable[..., ChatMessage]


def script_llama_index(asked: list[Sequence[ChatMessage]]) -> MockFunctionCallingLLM:
    def respond(messages: Sequence[ChatMessage], **kwargs: Any) -> ChatMessage:
        asked.append(messages)
        if messages[-1].role == MessageRole.TOOL:
            return ChatMessage(role="assistant", content="Venus, says planets.html.")
        call = ToolCallBlock(tool_call_id="1", tool_name="search_documents", tool_kwargs=SEARCH)
        return ChatMessage(role="assistant", blocks=[call])

    return MockFunctionCallingLLM(response_generator=respond)


async def test_an_agent_workflow_reads_reranked_passages(
    llama_index_store: ChunkStore, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sequence[ChatMessage]] = []
    retriever = llama_index_rag.StoreRetriever(llama_index_store)
    reranker = llama_index_rag.make_reranker("embedded", 2)
    agent = llama_index_agent.make_agent(script_llama_index(asked), retriever, reranker)
    assert await llama_index_agent.run_agent(agent, QUESTION) == "Venus, says planets.html."
    [tool_result] = [message for message in asked[1] if message.role == MessageRole.TOOL]
    assert str(tool_result.content).startswith("planets.html > Planets > Venus\n\nVenus is the **hottest**")
    assert "The agent searched for" in capsys.readouterr().out


def test_the_agent_workflow_runs_from_the_command_line(
    folder: Path, run_main: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_index_agent, "load_llm", lambda name, url: script_llama_index([]))
    output = run_main(llama_index_agent, QUESTION, "--folder", folder, "--llm", "scripted:model")
    assert "planets.html > Planets > Venus" in output
    assert output.endswith("Answer: Venus, says planets.html.\n")


@pytest.mark.parametrize("module", [langgraph_agent, llama_index_agent])
def test_an_agent_without_a_language_model_says_what_it_needs(
    module: Any, folder: Path, run_main: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(module, QUESTION, "--folder", folder)
    assert "--llm" in capsys.readouterr().err
