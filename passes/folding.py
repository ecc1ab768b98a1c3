"""Where a per-channel scale of some linears' input can go: into the norm or linear before them.

y = W x = (W diag(s)) (x / s), and the division by s is folded into what makes x (AWQ, arXiv
2306.00978, section 3.2). Which module that is, Olive's LayerWrapper says; whether it may be done is
not looked up by architecture but tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from olive.common.hf.wrapper import LayerWrapper, ModelWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

# In a quantized model's folder; deeper than where libraries look for weights.
FOLDS = Path("folds/scales.safetensors")


@dataclass
class Fold:
    """Linears that read one input of n channels, and the module that makes the input."""

    linears: list[nn.Linear]
    """All readers of the input."""
    source: Any
    """A norm of n channels, or a linear."""
    rows: slice = field(default_factory=lambda: slice(None))
    """Rows of a linear source that make the input: the v of a packed qkv, the up of a gate_up."""
    repeats: int = 1
    """Channels of the input made by one row: query heads for each key-value head."""
    head_size: int = 1
    """Channels that are repeated together."""

    def tie(self, x: Tensor) -> Tensor:
        """Give channels that one row makes their mean value; (n,) to (n,)."""
        heads = x.reshape(-1, self.repeats, self.head_size)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)

    def one_of_each(self, s: Tensor) -> Tensor:
        """One value for each row of the source that makes the input."""
        return s.reshape(-1, self.repeats, self.head_size)[:, 0].reshape(-1)

    def apply(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide the source by s (n,) and multiply the linears by it, in place.

        A norm keeps its `dtype`, so its weight is rounded to it first and the linears are
        multiplied by what it then really divides by: the model's function does not change.

        Returns:
            The s that was applied, (n,) float32.
        """
        if isinstance(self.source, nn.Linear):
            one = self.one_of_each(s)
            self.source.weight.data[self.rows] /= one[:, None]
            if self.source.bias is not None:
                self.source.bias.data[self.rows] /= one
        else:
            s = _divide_norm(self.source, s, dtype)
        for linear in self.linears:
            linear.weight.data *= s
        return s


class FoldScales:
    """What was folded, so that an update of the float model can be put over the folded one.

    A linear with weight W has W' = diag(1 / s_out) W diag(s_in) after the folds, and so an update
    B A of W becomes (B / s_out) (A s_in).

    Args:
        names: of the model's modules, none of which it keeps alive: a linear that was replaced
            goes, and takes its floats along.
    """

    def __init__(self, names: WeakKeyDictionary[nn.Module, str]) -> None:
        self.names = names
        self.scales: dict[str, Tensor] = {}

    def add(self, fold: Fold, s: Tensor) -> None:
        """Note that a fold was applied with s, (n,)."""
        for linear in fold.linears:
            self._multiply(f"{self.names[linear]}.s_in", s)
        if isinstance(fold.source, nn.Linear):
            s_out = torch.ones(fold.source.out_features, device=s.device)
            s_out[fold.rows] = fold.one_of_each(s)
            self._multiply(f"{self.names[fold.source]}.s_out", s_out)

    def _multiply(self, name: str, s: Tensor) -> None:
        self.scales[name] = s.float().cpu() * self.scales.get(name, 1)

    def save(self, path: Path) -> None:
        """Write MODULE.s_in (in_features,) and MODULE.s_out (out_features,), float32."""
        path.parent.mkdir(exist_ok=True)
        save_file({name: s.contiguous() for name, s in sorted(self.scales.items())}, path)


def _divide_norm(norm: Any, s: Tensor, dtype: torch.dtype) -> Tensor:
    offset = _weight_offset(norm)
    old = norm.weight.data + offset
    weight = (old / s - offset).to(dtype).to(s.dtype)
    new = weight + offset
    s = torch.where((old != 0) & (new != 0), old / new, s)
    if (bias := getattr(norm, "bias", None)) is not None:
        new_bias = (bias.data / s).to(dtype).to(s.dtype)
        bias.data.copy_(new_bias)
    norm.weight.data.copy_(torch.where(old != 0, weight, norm.weight.data))
    return s


def _weight_offset(norm: Any) -> int:
    """1 for a norm that multiplies by 1 + weight, as Gemma's does, else 0."""
    with restored([norm]):
        for parameter in norm.parameters(recurse=False):
            parameter.data.zero_()
        size = norm.weight.numel()
        x = torch.linspace(-1, 1, size, device=norm.weight.device, dtype=norm.weight.dtype)
        return int(norm(x).abs().max() > 0)


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put the modules' own parameters back at the end."""
    kept = [(p, p.data.clone()) for m in modules for p in m.parameters(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _linears(get: Callable[[bool], list[nn.Module]]) -> list[nn.Linear]:
    try:
        modules = get(False)
    except AttributeError:  # no attention in this layer, experts, or names Olive does not know
        return []
    found = [m for m in modules if isinstance(m, nn.Linear) and hasattr(m, "quant_info")]
    return found if len(found) == len(modules) else []


def _norm(get: Callable[[bool], Any]) -> list[Any]:
    try:
        norm = get(False)
    except AttributeError:
        return []
    return [norm] if getattr(norm, "weight", None) is not None else []


def candidates(wrapper: ModelWrapper, layer: LayerWrapper) -> Iterator[list[Fold]]:
    """Yield, for each input of a layer's linears, the folds to try, the likeliest first."""
    attn_in, attn_out = _linears(layer.get_attention_inputs), _linears(layer.get_attention_outputs)
    mlp_in, mlp_out = _linears(layer.get_mlp_inputs), _linears(layer.get_mlp_outputs)
    if attn_in:
        yield [Fold(attn_in, norm) for norm in _norm(layer.get_first_layer_norm)]
    if attn_in and attn_out:
        yield _value_folds(wrapper, attn_in[-1], attn_out[0])
    if mlp_in:
        yield [Fold(mlp_in, norm) for norm in _norm(layer.get_second_layer_norm)]
    if mlp_in and mlp_out:
        out, n = mlp_out[0], mlp_out[0].in_features
        rows = slice(-n, None)  # a packed gate_up has up last
        fits = [m for m in reversed(mlp_in) if m.out_features in (n, 2 * n)]
        yield [Fold([out], m, rows) for m in fits]


def _value_folds(wrapper: ModelWrapper, v: nn.Linear, o: nn.Linear) -> list[Fold]:
    """v → o: o reads each of v's heads as often as there are query heads for it."""
    size = wrapper.num_key_value_heads * wrapper.head_dim
    if v.out_features < size or o.in_features % size:
        return []
    return [Fold([o], v, slice(-size, None), o.in_features // size, wrapper.head_dim)]


def leaves_unchanged(
    fold: Fold, expected: Tensor, run: Callable[[], Tensor], dtype: torch.dtype
) -> bool:
    """Try a fold: scales of 2 and 1/2 are exact, so a valid one leaves what `run` gives alone.

    False for a fold across a nonlinearity, for a norm that something else reads too, and wherever
    channels are not where they were expected.
    """
    n = fold.linears[0].in_features
    device = fold.linears[0].weight.device
    pattern = torch.arange(n // fold.repeats, device=device) % 3 - 1  # period 3: no head has it
    s = 2.0 ** pattern.reshape(-1, 1, fold.head_size).expand(-1, fold.repeats, -1).reshape(-1)
    with restored([fold.source, *fold.linears]):
        fold.apply(s, dtype)
        found = run()
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
