"""Feed-forward layers in chunks: the same numbers and gradients, less work in the recomputation, and none elsewhere."""

from __future__ import annotations

import copy

import jaxtyping
import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from mutoscope.recipe import Lora
from mutoscope.training import feed_forward
from mutoscope.training.feed_forward import chunk_feed_forwards
from mutoscope.training.lora import add_lora
from mutoscope.training.offload import recomputed
from mutoscope.training.quantize import quantize_frozen

WIDTH, TOKENS, TEXT = 64, 40, 8


class Net(nn.Module):
    """Two of CogVideoX's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CogVideoXBlock(WIDTH, 2, 32, 16) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x, text = block(hidden_states=x, encoder_hidden_states=text, temb=c)
        return x + text.mean()


def made(targets: str = "attention", kind: str = "none") -> Net:
    torch.manual_seed(0)
    net = Net()
    add_lora(net, Lora(rank=2, targets=targets), seed=0)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    if kind != "none":
        quantize_frozen(net, kind, torch.device("cpu"))  # type: ignore[arg-type]
    return net


def gradients(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    x, text = torch.randn(2, TOKENS, WIDTH, requires_grad=True), torch.randn(2, TEXT, WIDTH, requires_grad=True)
    out = net(x, text, torch.randn(2, 16))
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad is not None and text.grad is not None
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"x": x.grad, "text": text.grad}


def recompute(net: Net) -> None:
    for block in net.blocks:
        block.forward = recomputed(block.forward)


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_the_numbers_are_those_of_the_whole_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, "CHUNK", 11)  # does not divide the 48 tokens
    net = made(kind=kind)
    ours = copy.deepcopy(net)
    chunk_feed_forwards(ours)
    recompute(net)
    recompute(ours)
    out, grads = gradients(net)
    our_out, our_grads = gradients(ours)
    assert torch.allclose(out, our_out, atol=1e-5)
    assert grads.keys() == our_grads.keys() and len(grads) > 2
    for name, grad in grads.items():
        assert torch.allclose(grad, our_grads[name], rtol=1e-4, atol=1e-4 * float(grad.abs().max())), name


def test_hidden_numbers_are_computed_twice_and_not_thrice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = torch.nn.functional.linear
    wide = lambda w: tuple(w.shape) == (4 * WIDTH, WIDTH)
    counted = lambda x, w, b=None: (calls.append(x.shape[-2]) if wide(w) else None, linear(x, w, b))[1]
    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    net = made()
    chunk_feed_forwards(net)
    recompute(net)
    gradients(net)
    assert sum(calls) == 2 * len(net.blocks) * (TOKENS + TEXT)


def test_layers_that_are_trained_or_gated_by_what_is_trained_are_left_alone() -> None:
    for targets in ("attention+mlp", r"norm2\.linear|to_q"):
        net = made(targets)
        before = [block.ff.forward for block in net.blocks]
        chunk_feed_forwards(net)
        assert [block.ff.forward for block in net.blocks] == before
    plain = nn.Sequential(nn.Linear(2, 2))
    chunk_feed_forwards(plain)  # without blocks


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_compiles_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks of shapes are not for the compiler
    monkeypatch.setattr(feed_forward, "CHUNK", 20)
    torch._dynamo.reset()
    net = made()
    expected = gradients(copy.deepcopy(net))
    chunk_feed_forwards(net)
    for block in net.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    recompute(net)
    out, grads = gradients(net)
    assert torch.allclose(out, expected[0], atol=1e-5)
    for name, grad in expected[1].items():
        assert torch.allclose(grad, grads[name], rtol=1e-4, atol=1e-4 * float(grad.abs().max())), name
