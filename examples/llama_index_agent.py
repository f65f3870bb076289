"""A LlamaIndex AgentWorkflow that searches your files: its tool retrieves 50 chunks and reranks them to 5.

    python -m examples.llama_index_agent "How do I keep a GPU busy?" --llm openai:gpt-4o-mini

Needs a language model; `--llm-url` takes one on your own machine.
"""

from __future__ import annotations

import asyncio

from llama_index.core.agent.workflow import AgentWorkflow, ToolCallResult
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode
from llama_index.core.tools import FunctionTool

from examples.folder import find_files
from examples.llama_index_rag import StoreRetriever, load_llm, make_reranker, split_file
from examples.terminal import (
    errors_end_the_program,
    llm_errors_end_the_program,
    make_agent_parser,
    open_store,
    report_update,
)

SYSTEM_PROMPT = (
    "Answer from what search_documents returns, and name the sources you used. Search again, in other "
    "words, if what it returns does not answer the question."
)


def make_search_tool(retriever: BaseRetriever, reranker: BaseNodePostprocessor) -> FunctionTool:
    """Return a tool that gives an agent the text of the best passages."""

    async def search_documents(query: str) -> str:
        """Search the user's documents. Ask a whole question: passages are ranked by how well they answer."""
        found = await retriever.aretrieve(query)
        nodes = await reranker.apostprocess_nodes(found, query_str=query)
        passages = [node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        return "\n\n".join(passages) or "Nothing found."

    return FunctionTool.from_defaults(async_fn=search_documents)


def make_agent(llm: LLM, retriever: BaseRetriever, reranker: BaseNodePostprocessor) -> AgentWorkflow:
    """Return a workflow that calls the model and the search tool in turn."""
    search = make_search_tool(retriever, reranker)
    return AgentWorkflow.from_tools_or_functions([search], llm=llm, system_prompt=SYSTEM_PROMPT)


async def run_agent(agent: AgentWorkflow, question: str) -> str:
    """Run an agent on a question, print what it reads, and return its answer."""
    handler = agent.run(user_msg=question)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"\nThe agent searched for {event.tool_kwargs} and read:\n\n{event.tool_output.content}")
    return str(await handler)


def main() -> None:
    """Run the agent on one question."""
    args = make_agent_parser(__doc__ or "").parse_args()
    with errors_end_the_program():
        with llm_errors_end_the_program():
            llm = load_llm(args.llm, args.llm_url)
        files = find_files(args.folder)
        store = open_store(args, "llama_index")
        report_update(store.update(files, split_file, progress=True), store)
        agent = make_agent(llm, StoreRetriever(store), make_reranker(args.model, args.top_n))
        with llm_errors_end_the_program():
            answer = asyncio.run(run_agent(agent, args.question))
        print(f"\nAnswer: {answer}")


if __name__ == "__main__":
    main()
