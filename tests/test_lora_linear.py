"""The layer of LoRA over packed weights: its equations, and what training keeps in memory."""

import gc

import pytest
import torch
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.rtn import Rtn
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from passes.lora import load_adapted, over_quantized, response_loss
from passes.lora_linear import AdaptedLinear, LoraQuantLinear, Tape, keep_products_alone, playing
from tests.models import save_model, token_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj"]
TARGETS += ["up_proj", "down_proj"]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_equation(bias, dropped):
    torch.manual_seed(0)
    x, a, b, w = drawn(2, 3, 5), drawn(4, 5), drawn(6, 4), drawn(6, 5).detach()
    source = drawn(2, 3, 5) if dropped else None
    offset = drawn(6).detach() if bias else None

    def layer(x: Tensor, source: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        return AdaptedLinear.apply(x, source, a, b, offset, 0.7, lambda like: w)

    update = linear(linear(x if source is None else source, a), b)
    torch.testing.assert_close(layer(x, source, a, b), linear(x, w, offset) + 0.7 * update)
    assert torch.autograd.gradcheck(layer, (x, source, a, b))


def adapted(folder, name: str, dropout: float = 0.0) -> nn.Module:
    """A quantized model with an adapter that is not zero, ready to be trained."""
    base = save_model(folder / "float", name)
    rtn = create_pass_from_dict(Rtn, {"group_size": 32}, True)
    rtn.run(HfModelHandler(str(base)), str(folder / "quantized"))
    model = load_adapted(folder / "quantized", None)
    config = LoraConfig(r=8, target_modules=TARGETS, lora_dropout=dropout)
    model = get_peft_model(model, over_quantized(config))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter)
    model.config.use_cache = False
    return model.train()


def loss_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)  # of the dropout
    ids = torch.tensor(token_sequences(2, 60))
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    return response_loss(model, ids, mask, ids)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["phi3", "llama", "qwen2", "gemma2"])
def test_gradients_are_the_same_to_the_bit_when_products_alone_are_kept(tmp_path, name, dropout):
    model = adapted(tmp_path, name, dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss_of(model), parameters)
    keep_products_alone(model)
    found = torch.autograd.grad(loss_of(model), parameters)
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


def kept_bytes(model: nn.Module) -> int:
    """Memory that the forward pass leaves for the backward pass."""
    gc.collect()
    before = {id(x) for x in gc.get_objects() if issubclass(type(x), Tensor)}
    model_storages = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    for x in gc.get_objects():  # those of the tape
        if issubclass(type(x), Tensor) and id(x) not in before:
            keep(x)
    del loss
    return sum(storages.values())


def test_less_than_two_thirds_is_kept(tmp_path):
    """Of a layer of Phi-3, in hidden sizes: 1 of its input and 3 + 1 + 4 + 1 of its products."""
    model = adapted(tmp_path, "phi3")
    everything = kept_bytes(model)
    keep_products_alone(model)
    assert kept_bytes(model) < everything * 2 / 3


def test_no_floats_of_the_weights_are_kept(tmp_path):
    model = adapted(tmp_path, "phi3")
    sizes = {m.get_base_layer().rows * m.get_base_layer().cols for m in model.modules()
             if isinstance(m, LoraQuantLinear)}  # fmt: skip
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model)
    assert kept
    assert not sizes & set(kept)


def test_a_product_that_was_written_over_is_an_error():
    tape = Tape()
    with playing(tape, again=False):
        y = tape(lambda: torch.ones(3))
    y.add_(1)
    with playing(tape, again=True), pytest.raises(RuntimeError, match="written over"):
        tape(lambda: torch.ones(3))
