"""What params.yaml may hold: types, ranges and defaults, checked before anything runs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from stages.errors import UserError, shortened
from stages.reading import ADAPTER_NAME, CONTROL, Missing, yaml_file

# A version of a model in Azure ML: of a registry, or of a workspace, as `az ml model show` says it.
ASSET = re.compile(
    r"azureml:(//registries/(?P<registry_name>[\w-]+)|//?subscriptions/(?P<subscription_id>[\w-]+)"
    r"/resource[gG]roups/(?P<resource_group>[\w().-]+)"
    r"(/providers/Microsoft\.MachineLearningServices)?/workspaces/(?P<workspace_name>[\w-]+))"
    r"/models/(?P<name>[\w.-]+)/versions/(?P<version>[\w.-]+)"
)
# A repository of the hub: it becomes a part of an address.
REPOSITORY = re.compile(r"([A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
# What DVC takes for an address, with one slash or none too; `notes:one.jsonl` is a file to it.
SCHEMES = {
    *("azure", "gdrive", "gs", "hdfs", "http", "https", "oss", "s3", "ssh"),
    *("webdav", "webdavs", "webhdfs", "ds", "dvc", "git", "memory", "remote"),
}
REMOTE = {"hf", "azureml"}  # sources that base.id names a model of
GROUP_SIZES = (16, 32, 64, 128, 256)  # those of MatMulNBits that every exporter takes


def _as_path(value: str) -> str:
    """Refuse what is no path of a file here: DVC takes an address for data that it should fetch."""
    if not value.strip() or CONTROL.search(value):
        raise ValueError("must be a path, without control characters")
    if "://" in value or urlparse(value).scheme in SCHEMES:
        raise ValueError("must be a path here, and not an address")
    return value


FilePath = Annotated[str, AfterValidator(_as_path)]


class Section(BaseModel):
    """A block of params.yaml. Unknown keys are errors; numbers and strings are never converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Base(Section):
    source: Literal["builtin", "hf", "local", "azureml"]
    """Where the base model comes from."""
    id: str
    """Hub repository, for `hf`. Address of a model version, for `azureml`."""
    revision: str | None
    """`hf`: commit of the repository, 40 hex digits. `azureml`: digest of the content, 64."""
    path: FilePath
    """`builtin`: the rows it is trained on. `local`: the model's folder."""
    seed: int = Field(ge=0)
    """`builtin`: initial weights and order of rows."""

    @model_validator(mode="after")
    def pinned(self) -> Base:
        if self.source == "hf" and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("base.revision must be a commit of 40 hex digits, not a branch or tag")
        if self.source == "hf" and (not REPOSITORY.fullmatch(self.id) or ".." in self.id):
            raise ValueError("base.id must be a repository of the hub, NAME or OWNER/NAME")
        if self.source == "azureml":
            if not ASSET.fullmatch(self.id):
                raise ValueError(
                    "base.id must be azureml://registries/NAME/models/MODEL/versions/VERSION, or "
                    "azureml://subscriptions/ID/resourceGroups/NAME/workspaces/NAME/models/MODEL"
                    "/versions/VERSION"
                )
            if self.revision and not re.fullmatch(r"[0-9a-f]{64}", self.revision):
                raise ValueError("base.revision must be null or a digest of 64 hex digits")
        return self


class Adapter(Section):
    data: FilePath
    """JSON Lines file, one example a line."""
    prompt_column: str = "prompt"
    """Key of the question in each row."""
    response_column: str = "response"
    """Key of the answer in each row."""


class Prepare(Section):
    eval_percent: int = Field(ge=1, le=90)
    """Share of rows kept for evaluation, in percent."""
    calibration_rows: int = Field(ge=1)
    """Rows written as calibration text."""
    template: str
    """`chat` for the tokenizer's template, or a text with {prompt} and {response}."""

    @field_validator("template")
    @classmethod
    def has_both(cls, value: str) -> str:
        if value != "chat":
            if value.count("{prompt}") != 1 or value.count("{response}") != 1:
                raise ValueError("must be `chat` or hold {prompt} and {response} once each")
            if value.index("{prompt}") > value.index("{response}"):
                raise ValueError("must hold {prompt} before {response}")
        return value


class Quantize(Section):
    algorithm: Literal["best", "awq", "gptq", "rtn", "kquant", "none"]
    """How weights are rounded."""
    bits: Literal[4, 8]
    """Bits of a weight."""
    group_size: int
    """Weights of a row that share a scale."""
    symmetric: bool
    """No zero points."""
    calibration_data: FilePath
    """JSON Lines with `text`, or with `prompt` and `response`."""
    calibration_samples: int = Field(ge=1)
    """Sequences."""
    calibration_seq_len: int = Field(ge=8)
    """Tokens in each sequence."""

    @field_validator("group_size")
    @classmethod
    def known_group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise ValueError(f"must be one of {', '.join(map(str, GROUP_SIZES))}")
        return value


class Finetune(Section):
    r: int = Field(ge=1, le=512)
    """Rank."""
    alpha: float = Field(gt=0)
    """The update is scaled by alpha / r."""
    dropout: float = Field(ge=0, lt=1)
    """On the input of the adapter, in training."""
    target_modules: list[str] = Field(min_length=1)
    """Last part of the names of the linear layers that get an adapter."""
    max_steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0, le=1)
    """Peak."""
    lr_scheduler: Literal["cosine", "linear", "constant"]
    """Shape after warm-up."""
    warmup_steps: int = Field(ge=0)
    """Steps from zero to the peak."""
    batch_size: int = Field(ge=1)
    """Rows a step."""
    max_seq_len: int = Field(ge=8)
    """Tokens in a row."""
    gradient_checkpointing: bool
    """Recompute activations: less memory, more time."""
    seed: int = Field(ge=0)
    """Initial adapter and order of rows."""

    @model_validator(mode="after")
    def leaves_steps_at_the_peak(self) -> Finetune:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"finetune.warmup_steps {self.warmup_steps} must be less than "
                f"finetune.max_steps {self.max_steps}"
            )
        return self


class Export(Section):
    device: Literal["cpu", "gpu"]
    """What it will run on."""
    provider: Literal["cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx"]
    """onnxruntime execution provider."""
    lm_head: Literal["float", "int8", "int4"]
    """Precision of the output head of a quantized model, which the quantizers leave in float."""
    accuracy_level: Literal[1, 4]
    """MatMulNBits arithmetic: 1 float32, 4 int8."""

    @model_validator(mode="after")
    def fits(self) -> Export:
        if (self.device == "cpu") != (self.provider == "cpu"):
            raise ValueError(
                f"export.provider {self.provider} cannot run on export.device {self.device}: "
                "cpu goes with cpu; cuda, dml, webgpu and NvTensorRtRtx go with gpu"
            )
        return self


class Evaluate(Section):
    max_rows: int = Field(ge=1)
    """Rows of the eval split that are scored."""
    max_new_tokens: int = Field(ge=1)
    """Longest generated answer, in tokens."""
    speed_tokens: int = Field(ge=2)
    """Tokens generated to measure speed."""
    text: FilePath
    """JSON Lines file of text that the base model knows."""
    text_tokens: int = Field(ge=2)
    """Tokens of it that are scored."""


class Gates(Section):
    max_quantized_perplexity_ratio: float | None = Field(gt=0)
    """Quantized over base, on `evaluate.text`."""
    max_onnx_perplexity_ratio: float | None = Field(gt=0)
    """ONNX without an adapter over quantized, on `evaluate.text`."""
    max_adapter_perplexity_ratio: float | None = Field(gt=0)
    """ONNX with the adapter over ONNX without."""
    min_top1_agreement: float | None = Field(ge=0, le=1)
    """PyTorch (quantized + LoRA) against ONNX with the adapter."""
    min_tokenizer_agreement: float | None = Field(ge=0, le=1)
    """Share of prompts that onnxruntime-genai's tokenizer cuts as the base model's does."""
    min_exact_answer_rate: float | None = Field(ge=0, le=1)
    """ONNX with the adapter, on the eval split."""


class Azure(Section):
    """Each may also be in the environment or in config.json; `stages.azure` says which wins."""

    subscription_id: str | None = None
    """Of the workspace."""
    resource_group: str | None = None
    """Of the workspace."""
    workspace_name: str | None = None
    """Where models are registered and jobs run."""
    registry_name: str | None = None
    """A registry that workspaces share, instead of a workspace."""
    cluster: str | None = None
    """Compute cluster of the workspace, for the stages of `compute`; None for serverless."""
    instance_type: str | None = None
    """Virtual machine of a serverless job."""


class Run(Section):
    concurrency: int = Field(ge=1, le=64)
    """Stages at once."""
    retries: int = Field(ge=0, le=10)
    """Tries after a failed stage."""
    time_limit_minutes: float = Field(gt=0)
    """For each stage; then it is killed."""
    time_limits: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Minutes, per stage."""


class Params(Section):
    base: Base
    adapters: dict[str, Adapter] = Field(min_length=1)
    prepare: Prepare
    quantize: Quantize
    finetune: Finetune
    export: Export
    evaluate: Evaluate
    gates: Gates
    azure: Azure = Field(default_factory=Azure)
    compute: dict[str, Literal["here", "azureml"]] = Field(default_factory=dict)
    """Where a stage runs, by `finetune` or `finetune@travel`; one that is not named runs here."""
    run: Run

    @field_validator("adapters")
    @classmethod
    def safe_names(cls, value: dict[str, Adapter]) -> dict[str, Adapter]:
        for name in value:
            # A dot would split the parameter's key, so fewer characters than in a file name.
            if not ADAPTER_NAME.fullmatch(name) or name in {"base", "none"}:
                raise ValueError(
                    f"{shortened(name)} cannot name an adapter: 1 to 64 letters, digits, _ and -, "
                    "not beginning with -, and not 'base' or 'none'"
                )
        return value

    @model_validator(mode="after")
    def has_a_machine(self) -> Params:
        if "azureml" in self.compute.values() and not (
            self.azure.cluster or self.azure.instance_type
        ):
            raise ValueError(
                "azure.cluster: which cluster? name one, or an azure.instance_type to go without"
            )
        return self

    def machine(self, stage: str) -> Literal["here", "azureml"]:
        """Where a stage runs: its own entry of `compute` counts before that of its group."""
        return self.compute.get(stage) or self.compute.get(stage.partition("@")[0]) or "here"


def known_keys() -> list[str]:
    """Every dotted key of params.yaml, `adapters.NAME.…` with NAME as it is written here."""
    keys = []
    for section, field in Params.model_fields.items():
        model = Adapter if section == "adapters" else field.annotation
        prefix = "adapters.NAME" if section == "adapters" else section
        keys += [section, *(f"{prefix}.{key}" for key in getattr(model, "model_fields", ()))]
    return keys


def _problem(error: Any) -> str:
    """One line for one pydantic error: the key, what is wrong, and the nearest known key."""
    loc = [_word(part) for part in error["loc"]]
    key = ".".join(loc) or "params"
    if error["type"] == "extra_forbidden":
        shown = ["adapters", "NAME", *loc[2:]] if loc[0] == "adapters" and len(loc) > 2 else loc
        near = difflib.get_close_matches(".".join(shown), known_keys(), 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{key}: unknown parameter{hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if error["loc"] and not message.startswith(key) else message
    return f"{key}: must be {message}, not {shortened(error['input'])}"


def _word(part: object) -> str:
    """A part of a key as it is shown: on one line, and not without end."""
    text = CONTROL.sub("?", str(part))
    return text if len(text) <= 80 else text[:77] + "…"


def check(values: Any, source: str = "params.yaml") -> Params:
    """Typed parameters from what YAML gave.

    Raises:
        UserError: every unknown key, wrong type and value out of range, one a line.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping of sections")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {_problem(e)}" for e in error.errors())) from None


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml."""
    try:
        return check(yaml_file(path), path.name)
    except Missing:
        raise UserError(f"{path}: not found; run this in the folder of the project") from None
