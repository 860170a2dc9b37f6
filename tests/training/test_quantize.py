"""Frozen weights in few bits: how near they stay, that they never change, and what autograd keeps of them."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutoscope.recipe import Lora
from mutoscope.training import quantize as module
from mutoscope.training.lora import add_lora, lora_layers, merged_weights
from mutoscope.training.quantize import (
    Kind,
    QuantizedLinear,
    check_quantization,
    quantize,
    quantize_frozen,
)

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("int8", "fp8", "nf4")


class Net(nn.Module):
    """A network with blocks, whose second layer is too small to be worth it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attention": nn.ModuleDict({"query": nn.Linear(64, 96)}), "down": nn.Linear(96, 64)})
            for _ in range(2)
        )
        self.gate = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + self.gate * block["down"](F.gelu(block["attention"]["query"](x)))  # type: ignore[index]
        return x


def net(lora: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    if lora:
        add_lora(model, Lora(rank=4), seed=0)
    return model


def layer(rows: int = 96, columns: int = 64) -> nn.Linear:
    torch.manual_seed(1)
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-2, 1, rows)[:, None])  # rows of very different lengths
    return linear.requires_grad_(False)


def dense(quantised: QuantizedLinear) -> Tensor:
    """The weight, as told by what the layer computes."""
    eye = torch.eye(quantised.in_features)
    return (quantised(eye) - quantised(torch.zeros_like(eye))).T


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.008), ("fp8", 0.04), ("nf4", 0.11)])
def test_weights_stay_near(kind: Kind, bound: float) -> None:
    """The error of each row in proportion to its length, whatever those of the others are."""
    linear = layer()
    error = (dense(QuantizedLinear(linear, kind, CPU)) - linear.weight).norm(dim=1) / linear.weight.norm(dim=1)
    assert 0 < error.max() < bound


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_the_code_has_are_kept(kind: Kind) -> None:
    values = torch.tensor(module.NF4) if kind == "nf4" else torch.tensor([-1.0, -0.5, 0, 0.25, 1.0])
    if kind == "int8":
        values = torch.tensor([-127.0, -3, 0, 1, 127]) / 127
    linear = nn.Linear(64, 64, bias=False).requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(2 * values[torch.arange(64 * 64) % len(values)].view(64, 64))
        linear.weight[3] = 0
    torch.testing.assert_close(dense(QuantizedLinear(linear, kind, CPU)), linear.weight.detach(), atol=0, rtol=1e-6)


def test_nf4_is_that_of_its_inventors() -> None:
    """arXiv:2305.14314, appendix E: symmetric halves of the normal distribution's quantiles, with an exact zero."""
    normal = torch.distributions.Normal(0, 1)
    offset = 0.9677083  # 1/2 (1 − 1/32 + 1 − 1/30)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(torch.tensor(module.NF4).double(), values / values.max(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.5), ("fp8", 8.5), ("nf4", 4.25)])
def test_bits_per_weight(kind: Kind, bits: float) -> None:
    codes, scale = quantize(torch.randn(256, 64), kind)
    assert 8 * (codes.nbytes + scale.nbytes) / (256 * 64) == bits  # a row of 64 shares 32 bits; long ones hardly


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unpacked_weight(kind: Kind) -> None:
    quantised = QuantizedLinear(layer(), kind, CPU)
    weight = dense(quantised).detach()
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = quantised(x)
    y.square().sum().backward()
    found, x.grad = x.grad, None
    same = F.linear(x, weight, quantised.bias)
    torch.testing.assert_close(y, same, rtol=1e-5, atol=1e-4)
    same.square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_no_unpacked_weight(kind: Kind) -> None:
    quantised, kept = QuantizedLinear(layer(), kind, CPU), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        quantised(torch.randn(3, 64, requires_grad=True))
    assert kept
    assert not any(x.is_floating_point() and x.numel() >= quantised.weight.numel() for x in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_over_a_base_that_never_changes(kind: Kind) -> None:
    model = net()
    quantize_frozen(model, kind, CPU)
    base = {name: x.clone() for name, x in model.state_dict().items() if "lora" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4  # A and B of the attention in each block
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    x, target = torch.randn(16, 64), torch.randn(16, 64)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = model.state_dict()
    assert [name for name, before in base.items() if not torch.equal(after[name], before)] == []


def test_only_frozen_layers_of_blocks_are_replaced() -> None:
    model = net()
    quantize_frozen(model, "int8", CPU)
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("attention.query.base_layer", "down")
    }
    assert {type(m) for n, m in model.named_modules() if "lora_" in n} & {QuantizedLinear} == set()
    assert type(model.embed) is nn.Linear
    small = net(lora=False)
    small.blocks[0]["down"] = nn.Linear(8, 8).requires_grad_(False)  # type: ignore[index,operator]
    quantize_frozen(small, "int8", CPU)
    assert type(small.blocks[0]["down"]) is nn.Linear  # type: ignore[index]


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(ValueError, match="no frozen linear layers of 4096"):
        quantize_frozen(Net(), "int8", CPU)  # all of it is trained
    with pytest.raises(ValueError, match="no frozen linear layers"):
        quantize_frozen(nn.Linear(64, 64).requires_grad_(False), "int8", CPU)
    odd = net(lora=False)
    odd.blocks[0]["down"] = nn.Linear(4099, 1).requires_grad_(False)  # type: ignore[index,operator]
    with pytest.raises(ValueError, match="1 × 4099 weights is not made of blocks of 64; take int8"):
        quantize_frozen(odd, "nf4", CPU)


def test_codes_are_never_taken_for_weights() -> None:
    """What merges adapters into a base must notice that this one is not the weights, for fp8 as well."""
    for kind in KINDS:
        model = net()
        quantize_frozen(model, kind, CPU)
        assert not next(m for _, m in lora_layers(model)).base_layer.weight.is_floating_point()
        with pytest.raises(ValueError, match="quantised"):
            dict(merged_weights(model))


@pytest.mark.parametrize("kind", KINDS)
def test_computes_in_the_precision_of_what_flows_through(kind: Kind) -> None:
    linear = layer()
    quantised, x = QuantizedLinear(linear, kind, CPU), torch.randn(4, 64)
    assert quantised(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x)
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), quantised(x), rtol=0.05, atol=0.05 * linear.weight.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes are not for the compiler
    torch._dynamo.reset()
    for kind in KINDS:
        quantised = QuantizedLinear(layer(), kind, CPU)
        x = torch.randn(3, 64, requires_grad=True)
        torch.compile(quantised, backend="aot_eager", fullgraph=True)(x).sum().backward()
        found, x.grad = x.grad, None
        quantised(x).sum().backward()
        torch.testing.assert_close(found, x.grad)


def test_fp8_with_compile_on_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch/pytorch#167082: Triton has no e4m3 below compute capability 8.9."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"A100 is older; take int8, or compile = false"):
        check_quantization("fp8", gpu, compiled=True)
    check_quantization("fp8", gpu, compiled=False)
    check_quantization("int8", gpu, compiled=True)
    check_quantization("fp8", CPU, compiled=True)
