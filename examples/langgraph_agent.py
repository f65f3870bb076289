"""A LangGraph agent that searches your files: its tool retrieves 50 chunks and reranks them to 5.

    python -m examples.langgraph_agent "How do I keep a GPU busy?" --llm openai:gpt-4o-mini

Needs a language model that calls tools; `--llm-url` takes one on your own machine.
"""

from __future__ import annotations

from typing import Any

from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import ToolMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool, tool
from langgraph.graph.state import CompiledStateGraph

from examples.folder import find_files
from examples.langchain_rag import (
    as_sources,
    format_passages,
    load_llm,
    make_reranker,
    make_retriever,
    split_file,
)
from examples.terminal import (
    errors_end_the_program,
    llm_errors_end_the_program,
    make_agent_parser,
    open_store,
    print_sources,
    report_update,
)

SYSTEM_PROMPT = (
    "Answer from what search_documents returns, and name the sources you used. Search again, in other "
    "words, if what it returns does not answer the question."
)


def make_search_tool(retriever: BaseRetriever) -> BaseTool:
    """Return a tool that gives an agent the text of the best passages, and the caller their documents."""

    @tool(response_format="content_and_artifact")
    def search_documents(query: str) -> tuple[str, list[Document]]:
        """Search the user's documents. Ask a whole question: passages are ranked by how well they answer."""
        documents = retriever.invoke(query)
        return format_passages(documents) or "Nothing found.", documents

    return search_documents


def make_agent(llm: BaseChatModel, retriever: BaseRetriever) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return a compiled LangGraph graph that calls the model and the search tool in turn."""
    return create_agent(llm, tools=[make_search_tool(retriever)], system_prompt=SYSTEM_PROMPT)


def main() -> None:
    """Run the agent on one question."""
    args = make_agent_parser(__doc__ or "").parse_args()
    with errors_end_the_program():
        with llm_errors_end_the_program():
            llm = load_llm(args.llm, args.llm_url)
        files = find_files(args.folder)
        store = open_store(args, "langchain")
        report_update(store.update(files, split_file, progress=True), store)
        agent = make_agent(llm, make_retriever(store, make_reranker(args.model, args.top_n)))
        with llm_errors_end_the_program():
            state = agent.invoke({"messages": [("user", args.question)]})
        for message in state["messages"]:
            if isinstance(message, ToolMessage):
                print_sources("The agent searched and read", as_sources(message.artifact, "relevance_score"))
        print(f"\nAnswer: {state['messages'][-1].text}")


if __name__ == "__main__":
    main()
