"""`/v1/embeddings`, `/pooling`, `/classify`, `/score` and `/rerank`: requests and responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import Count, RequestBody, ResponseBody, TokenId

Input = str | list[str] | list[TokenId] | list[list[TokenId]]
Prompt = str | list[int]


class PoolingFields(RequestBody):
    """What all of these endpoints take."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset({"user"})

    model: str | None = None
    add_special_tokens: bool | None = None
    """None: yes."""
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class EmbeddingRequest(PoolingFields):
    """Texts, or token ids, that become vectors."""

    input: Input
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class PoolingRequest(PoolingFields):
    """Texts, or token ids, that become what the model's head makes of them."""

    input: Input
    task: Literal["embed", "classify", "token_embed", "token_classify", "reward"] | None = None
    """None: the first that the model does."""
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    use_activation: bool | None = None


class ClassificationRequest(PoolingFields):
    """Texts, or token ids, that get labels."""

    input: Input
    use_activation: bool | None = None


class ScoreRequest(PoolingFields):
    """Pairs of texts: one with each, or one by one."""

    text_1: str | list[str]
    text_2: str | list[str]
    use_activation: bool | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs. Raises: RequestError for lists that do not fit."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second) or not first:
            raise RequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}; give one and several, "
                "or as many in both",
                param="text_1",
            )
        return list(zip(first, second, strict=True))


class RerankDocument(RequestBody):
    """A document as Jina's API also has it."""

    text: str


class RerankRequest(PoolingFields):
    """Documents to be put in the order in which they answer a query."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "max_tokens_per_doc": (),
        "max_chunks_per_doc": (),
        "rank_fields": ([], ["text"]),
        "return_embeddings": (False,),
    }

    query: str
    documents: list[str | RerankDocument] = Field(min_length=1)
    top_n: Count | None = Field(default=None, ge=0)
    """0 or None: all."""
    return_documents: bool | None = None
    """None: yes, but not at `/v2/rerank`."""

    def texts(self) -> list[str]:
        """The documents as texts."""
        return [d if isinstance(d, str) else d.text for d in self.documents]


class PoolingUsage(ResponseBody):
    """Tokens of one request."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingItem(ResponseBody):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""


class EmbeddingResponse(ResponseBody):
    """The vectors, in the order of the input."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: PoolingUsage


class PoolingItem(ResponseBody):
    """What came of one text."""

    object: Literal["pooling"]
    index: int
    data: list[float] | list[list[float]] | str


class PoolingResponse(ResponseBody):
    """What came of the texts, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PoolingItem]
    usage: PoolingUsage


class ClassificationItem(ResponseBody):
    """One text's labels."""

    index: int
    label: str
    """The likeliest."""
    probs: list[float]
    num_classes: int


class ClassificationResponse(ResponseBody):
    """The labels of the texts, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassificationItem]
    usage: PoolingUsage


class ScoreItem(ResponseBody):
    """One pair's score."""

    index: int
    object: Literal["score"]
    score: float


class ScoreResponse(ResponseBody):
    """The scores of the pairs, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreItem]
    usage: PoolingUsage


class RerankedDocument(ResponseBody):
    """A document that was given."""

    text: str


class RerankItem(ResponseBody):
    """One document's place."""

    index: int
    """In the request."""
    relevance_score: float
    document: RerankedDocument | None = None


class RerankUsage(ResponseBody):
    """Tokens of one request."""

    total_tokens: int


class RerankResponse(ResponseBody):
    """The best documents, best first."""

    id: str
    model: str
    results: list[RerankItem]
    usage: RerankUsage


def prompts_of(given: Input) -> list[Prompt]:
    """One prompt or several, as a list. Raises: RequestError if there is none."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("input is an empty list; give texts or token ids", param="input")
    ids = [token_id for token_id in given if isinstance(token_id, int)]
    if ids:
        return [ids]
    return [prompt for prompt in given if not isinstance(prompt, int)]
