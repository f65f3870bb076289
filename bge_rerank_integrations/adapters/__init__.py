"""What the LangChain and the LlamaIndex adapter share."""
