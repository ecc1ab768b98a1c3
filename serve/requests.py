"""What a client may ask: the requests of OpenAI's API that are answered here.

https://platform.openai.com/docs/api-reference/chat/create and …/completions/create. A null counts
as not given. What the API has and this server has not is refused by its name, as is what neither
has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.errors import ApiError, unsupported

# Said about the client or its bill: nothing here depends on them.
WITHOUT_EFFECT = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Values that ask for what is done anyway.
AS_IT_IS: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "functions": [[]],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
}
UNSUPPORTED = {*AS_IT_IS, "audio", "function_call", "reasoning_effort", "web_search_options"}
TOKENS = 1 << 20
PROMPTS, MESSAGES, BIASES = 256, 4096, 1024
Penalty = Annotated[float, Field(ge=-2, le=2)]


Tokens = Annotated[list[int], Field(max_length=TOKENS, fail_fast=True)]
Many = TypeVar("Many")
Few = Annotated[list[Many], Field(max_length=PROMPTS, fail_fast=True)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Strict):
    """What the two requests share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] = []
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[
        dict[Annotated[str, Field(max_length=8)], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=BIASES),
    ] = {}
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ApiError(400, "the body must be a JSON object")
        values = {key: value for key, value in given.items() if value is not None}
        for name in UNSUPPORTED & values.keys():
            if values.pop(name) not in AS_IT_IS.get(name, []):
                raise unsupported(name)
        for name in WITHOUT_EFFECT:
            values.pop(name, None)
        for name in values.keys() - cls.model_fields.keys():
            raise ApiError(400, f"Unrecognized request argument: {name[:80]}", name[:80])
        return values

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: needs stream to be true", "stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; an empty one ends none."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return [text for text in stops if text]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _spoken(cls, given: Any) -> Any:
        if isinstance(given, dict):
            if given.get("role") in ("tool", "function"):
                raise unsupported("messages.role", f"{given['role']} is not supported here")
            if isinstance(parts := given.get("content"), list):
                for part in parts:
                    if isinstance(part, dict) and part.get("type") not in ("text", None):
                        raise unsupported(
                            "messages.content", f"{str(part['type'])[:40]} is not supported here"
                        )
            # An assistant's message that a client gives back as it came.
            empty = {"refusal", "annotations", "audio", "function_call", "tool_calls"}
            given = {k: v for k, v in given.items() if not (k in empty and not v)}
        return given

    def as_template(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[str | Few[str] | Tokens | Few[Tokens], Field(union_mode="left_to_right")]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class LoadAdapter(Strict):
    """POST /v1/load_lora_adapter, named as in vLLM."""

    lora_name: str
    lora_path: str


class UnloadAdapter(Strict):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
