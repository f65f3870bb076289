"""Vectors from a sentence-transformers model, for `--embedding`."""

from __future__ import annotations

from collections.abc import Sequence

from bge_rerank_integrations.errors import ConfigError


class SentenceEmbedder:
    """Embeds with a bi-encoder such as `BAAI/bge-small-en-v1.5`.

    Args:
        model: Hub id or local folder.

    Raises:
        ConfigError: sentence-transformers is not installed, or cannot load the model.
    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError("--embedding needs a package: pip install sentence-transformers") from error
        try:
            self._model = SentenceTransformer(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the embedding model {model!r} cannot be loaded: {reason}") from error
        self.dimension = len(self.embed_question("How long is a vector?"))

    def embed_passages(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector of length 1 for each text."""
        vectors = self._model.encode_document(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return [vector.tolist() for vector in vectors]

    def embed_question(self, text: str) -> list[float]:
        """Return the vector, of length 1, of a question with the instruction that the model wants."""
        vector = self._model.encode_query(text, normalize_embeddings=True, show_progress_bar=False)
        return [float(value) for value in vector]
