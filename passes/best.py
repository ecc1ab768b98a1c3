"""The most faithful rounding found: AWQ's scales, errors made good downstream, codes by descent.

Each part is from a paper, named where it is done; what each brings is in docs/quality.md.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from torch import Tensor, nn

from passes.awq import Awq, Batches, Reader
from passes.rounding import corrected, damped, descend, quantizer_of, refit


class Best(Awq):
    """Quantization of the blocks' linear layers to `QuantLinear`, for the lowest perplexity.

    1. Scales between a linear and what makes its input, as in `Awq`.
    2. Linears are taken in the order in which they are called. Their inputs are those that the
       already quantized part of the model gives, and their weights are first changed to give on
       these what the float ones give on the float model's inputs.
    3. Ranges as in `Awq`; then sweeps of coordinate descent over the codes, and after each the
       scales that fit the codes best.
    """

    products = nullcontext  # float32: the weights come from linear equations

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        def param(type_: type, default: float, description: str) -> PassConfigParam:
            return PassConfigParam(type_=type_, default_value=default, description=description)

        return {
            **super()._default_config(accelerator_spec),
            "sweeps": param(int, 8, "Sweeps over the codes, each with a refit of the scales."),
            "damping": param(float, 0.03, "Share of the Gram matrix's mean diagonal added to it."),
            "ridge": param(float, 0.1, "The same, when weights are changed for quantized inputs."),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> HfModelHandler:
        self._quantized: Batches | None = None  # what the quantized layers before this one give
        return super()._run_for_config(model, config, output_model_path)

    def _round_layer(
        self, module: nn.Module, readers: list[Reader], batches: Batches, dtype: torch.dtype
    ) -> None:
        quantized = self._quantized or batches
        reference = copy.deepcopy(module)
        for linears, _ in readers:
            gram, cross = products(reference, module, linears[0], (batches, quantized))
            for linear in linears:
                self._fit(module, linear, gram, cross, dtype)
        self._quantized = quantized.through(module)

    def _fit(
        self, module: nn.Module, linear: nn.Linear, gram: Tensor, cross: Tensor, dtype: torch.dtype
    ) -> None:
        """Put a QuantLinear in the linear's place."""
        if gram.diag().any():
            linear.weight.data = corrected(linear.weight.data, gram, cross, self.config.ridge)
        w = linear.weight.data
        quantizer = quantizer_of(linear)
        scales, zero_points = self._ranges(linear, gram, dtype)
        q = quantizer.fake_quantize(w, scales, zero_points)
        smooth = damped(gram, self.config.damping)
        for _ in range(self.config.sweeps):
            q = descend(w, q, (scales, zero_points), smooth, quantizer)
            q, scales = refit(w, q, scales, smooth, dtype)
        linear.weight.data = q
        self._replace(module, linear, (scales, zero_points))


def products(
    reference: nn.Module, module: nn.Module, linear: nn.Linear, batches: tuple[Batches, Batches]
) -> tuple[Tensor, Tensor]:
    """What `linear` of `module` gets in both models, on the same tokens.

    Args:
        reference: the float layer, on the first batches.
        module: the layer so far quantized, on the second.
        linear: one of the linears of `module`.
        batches: from the float model, from the quantized one.

    Returns:
        Sum of x' x'^T and sum of x x'^T, (in_features, in_features) each, where x is the input in
        the float layer and x' that in the quantized one.
    """
    name = next(name for name, found in module.named_modules() if found is linear)
    seen: list[Tensor] = []
    hooks = [
        m.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for m in (reference, module)
    ]
    n, device = linear.in_features, linear.weight.device
    gram, cross = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    try:
        for _ in zip(batches[0].calls(reference), batches[1].calls(module), strict=True):
            if len(seen) == 2 and len(seen[0]) == len(seen[1]):  # else an expert met other tokens
                gram.addmm_(seen[1].T, seen[1])
                cross.addmm_(seen[0].T, seen[1])
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return gram, cross
