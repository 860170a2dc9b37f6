"""Adapters: where they go, what they leave alone, what they learn, and that they are what PEFT takes them for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mutoscope.adapters import write_diffusers, write_kohya
from mutoscope.models.cogvideox import CogVideoX, CogVideoXModel
from mutoscope.models.dit import DiT, DiTModel
from mutoscope.recipe import Lora
from mutoscope.training.lora import (
    adapter_of,
    adapter_state,
    add_lora,
    find_targets,
    load_adapter_state,
    lora_layers,
    merged_weights,
    network_of,
)
from mutoscope.training.quantize import QuantizedLinear
from mutoscope.types import Cond, ModelIO

CPU = torch.device("cpu")
IO = ModelIO(channels=4, grid=(3, 4, 4), text_dim=32)
ATTENTION = [f"transformer_blocks.{n}.attn1.{part}" for n in range(2) for part in ("to_q", "to_k", "to_v", "to_out.0")]


def cogvideox(weights: str = "fp32", name: str = "cogvideox-t2v") -> CogVideoXModel:
    return CogVideoX(path=f"tiny://{name}", weights=weights).build(IO)  # type: ignore[arg-type]


def dit() -> DiTModel:
    torch.manual_seed(0)
    model = DiT(depth=2, width=32, heads=2, attention="joint").build(IO)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # not adaLN's zeros, behind which nothing shows
    return model


def output(model: nn.Module, batch: int = 1, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, 32, 32, generator=g)
    cond = Cond(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool))
    out: Tensor = model(torch.randn(batch, 4, 3, 4, 4, generator=g), torch.full((batch,), 500.0), cond)
    return out


def shake(model: nn.Module) -> None:
    """As if trained: every adapter somewhere else."""
    g = torch.Generator().manual_seed(7)
    for name, tensor in adapter_state(model).items():
        tensor.add_((0.05 if "magnitude" in name else 0.3) * torch.randn(tensor.shape, generator=g))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cogvideox fp32": cogvideox,
    "cogvideox bf16": lambda: cogvideox("bf16"),
    "dit": dit,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
lora_and_dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


# ---- where


def test_targets_in_diffusers_transformers_and_in_ours() -> None:
    assert find_targets(network_of(cogvideox()), "attention") == ATTENTION
    both = find_targets(network_of(cogvideox()), "attention+mlp")
    assert set(both) - set(ATTENTION) == {f"transformer_blocks.{n}.ff.net.{x}" for n in (0, 1) for x in ("0.proj", "2")}
    ours = find_targets(dit(), "attention")
    assert ours[:6] == [
        f"blocks.0.{part}.{name}" for part in ("attention", "cross") for name in ("query", "key_value", "out")
    ]
    assert set(find_targets(dit(), "attention+mlp")) - set(ours) == {
        f"blocks.{n}.mlp.{x}" for n in (0, 1) for x in ("up", "down")
    }


def test_targets_by_regular_expression() -> None:
    network = network_of(cogvideox())
    assert find_targets(network, "to_q|to_v") == [name for name in ATTENTION if "to_q" in name or "to_v" in name]
    finetrainers = r"(transformer_blocks|single_transformer_blocks).*(to_q|to_k|to_v|to_out.0)"
    assert find_targets(network, finetrainers) == ATTENTION
    assert find_targets(network, r"blocks\.1\.attn1\.to_q$") == ["transformer_blocks.1.attn1.to_q"]


def test_only_the_targets_have_adapters_though_others_end_in_their_names() -> None:
    """PEFT takes a list of names for their ends."""
    inner = nn.Module()
    inner.q = nn.Linear(3, 3)
    outer = nn.Module()
    outer.q, outer.inner = nn.Linear(3, 3), inner
    add_lora(outer, Lora(rank=2, targets="^q$"), seed=0)
    assert [name for name, _ in lora_layers(outer)] == ["q"]


def test_no_target_is_an_error_that_names_near_ones() -> None:
    with pytest.raises(ValueError, match=r"'to_qq' matches none of the \d+ linear layers of CogVideoXTransformer3DModel"
                                         r"[^!]*transformer_blocks.N.attn1.to_q"):  # fmt: skip
        add_lora(cogvideox(), Lora(targets="to_qq"), seed=0)
    with pytest.raises(ValueError, match=r"there are:\n  \S*patch_embed.text_proj\n[^!]*and \d+ more"):
        add_lora(cogvideox(), Lora(targets="nothing of the kind"), seed=0)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": -1.0}, "lora.alpha=-1 must be above 0"),
        ({"dropout": 1.0}, "lora.dropout=1 must be at least 0 and below 1"),
        ({"targets": "("}, "not a regular expression"),
        ({"init_alpha": 4.0}, "init_from, which is not given"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, float | str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Lora(**fields)  # type: ignore[arg-type]


def test_a_model_has_one_lora() -> None:
    model = cogvideox()
    add_lora(model, Lora(rank=2), seed=0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, Lora(rank=2), seed=0)


# ---- at the start


@every_model
@lora_and_dora
def test_the_output_is_that_of_the_base_bit_for_bit(make: Callable[[], nn.Module], dora: bool) -> None:
    model = make().train()
    before = output(model)
    add_lora(model, Lora(rank=4, alpha=3.0, dora=dora), seed=0)
    assert torch.equal(output(model), before)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = output(model)
        plain = output(make().train())
    assert torch.equal(adapted, plain)


@every_model
@lora_and_dora
def test_only_adapters_train_and_they_are_fp32(make: Callable[[], nn.Module], dora: bool) -> None:
    model = make()
    add_lora(model, Lora(rank=4, dora=dora), seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == len(adapter_state(model)) == (3 if dora else 2) * len(list(lora_layers(model)))
    assert sum(p.numel() for p in trained.values()) == sum(t.numel() for t in adapter_state(model).values())


def test_adapters_hang_on_the_seed_and_their_names_alone() -> None:
    def drawn(seed: int, targets: str = "attention") -> dict[str, Tensor]:
        model = cogvideox()
        add_lora(model, Lora(rank=4, targets=targets), seed=seed)
        return adapter_state(model)

    one, again, other, more = drawn(0), drawn(0), drawn(1), drawn(0, "attention+mlp")
    key = f"{ATTENTION[0]}.lora_A.weight"
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one[key], other[key])
    assert all(torch.equal(one[k], more[k]) for k in one) and len(more) > len(one)
    assert not torch.equal(one[key], one[f"{ATTENTION[1]}.lora_A.weight"])
    bound = 1 / 32**0.5  # kaiming_uniform with a = √5, as PEFT: U(±1/√in)
    assert 0.9 * bound < one[key].abs().max() <= bound


def test_the_global_generator_is_left_alone() -> None:
    model = cogvideox()
    state = torch.random.get_rng_state()
    add_lora(model, Lora(rank=4, dora=True), seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_on_the_meta_device() -> None:
    """For parameters and memory to be counted without weights."""
    with torch.device("meta"):
        model = cogvideox("bf16")
        add_lora(model, Lora(rank=4), seed=0)
    assert {t.device.type for t in adapter_state(model).values()} == {"meta"}
    assert sum(t.numel() for t in adapter_state(model).values()) == 8 * 4 * (32 + 32)


# ---- while it trains


def fit(
    model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, autocast: bool = False
) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (output(model, batch=2).float() - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [False, True])
@lora_and_dora
def test_fp32_adapters_learn_over_a_bf16_base_that_stays(dora: bool, autocast: bool) -> None:
    model = cogvideox("bf16").train()
    before = {name: tensor.clone() for name, tensor in network_of(model).state_dict().items()}
    add_lora(model, Lora(rank=4, dora=dora), seed=0)
    losses = fit(model, 12, autocast=autocast)
    assert losses[-1] < 0.98 * losses[0]
    after = {k.replace(".base_layer", ""): v for k, v in network_of(model).state_dict().items() if "lora_" not in k}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_training_keeps_no_fp32_copies_of_bf16_activations() -> None:
    """PEFT takes each adapter's input to fp32 and keeps that for the backward pass: 0.2 GB a time at 5b's sizes."""
    model = cogvideox("bf16").train()
    add_lora(model, Lora(rank=4), seed=0)
    layer = dict(lora_layers(model))[ATTENTION[0]]
    x = torch.randn(1, 500, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert not [t for t in kept if t.dtype == torch.float32 and 500 in t.shape]
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_the_blocks_compile_whole_with_adapters() -> None:
    model = cogvideox("bf16").train()
    add_lora(model, Lora(rank=4), seed=0)
    shake(model)
    eager = output(model)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")  # raises on a graph break
    assert torch.equal(output(model), eager)
    torch._dynamo.reset()


def test_dropout_is_for_training() -> None:
    model = cogvideox()
    add_lora(model, Lora(rank=4, dropout=0.5), seed=0)
    shake(model)
    model.eval()
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


def test_a_resumed_run_ends_in_the_same_bits() -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    whole = cogvideox("bf16").train()
    add_lora(whole, Lora(rank=4), seed=0)
    fit(whole, 6, optimizer(whole))

    first = cogvideox("bf16").train()
    add_lora(first, Lora(rank=4), seed=0)
    fit(first, 3, opened := optimizer(first))
    second = cogvideox("bf16").train()
    add_lora(second, Lora(rank=4), seed=99)  # of which nothing remains
    load_adapter_state(second, {k: v.clone() for k, v in adapter_state(first).items()}, source="checkpoint")
    resumed = optimizer(second)
    resumed.load_state_dict(opened.state_dict())
    fit(second, 3, resumed)
    assert all(torch.equal(v, adapter_state(second)[k]) for k, v in adapter_state(whole).items())


# ---- loading


def test_states_are_loaded_strictly_or_not_at_all() -> None:
    model = cogvideox()
    with pytest.raises(ValueError, match="call add_lora first"):
        load_adapter_state(model, {}, source="f")
    add_lora(model, Lora(rank=4), seed=0)
    good = {k: torch.ones_like(v) for k, v in adapter_state(model).items()}
    before = {k: v.clone() for k, v in adapter_state(model).items()}
    key = f"{ATTENTION[0]}.lora_A.weight"
    for bad, told in [
        ({k: v for k, v in good.items() if k != key}, f"1 faults\n  {key}: missing from the file"),
        (good | {"x.lora_A.weight": torch.ones(4, 32)}, "x.lora_A.weight: not in the model"),
        (good | {key: torch.ones(8, 32)}, rf"{key}: \[8, 32\], the model's is \[4, 32\]"),
        ({}, r"16 faults[^!]*and 6 more"),
    ]:
        with pytest.raises(ValueError, match=told):
            load_adapter_state(model, bad, source="file.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in adapter_state(model).items())
    load_adapter_state(model, good, source="file.safetensors")
    assert all((v == 1).all() for v in adapter_state(model).values())


# ---- parity with PEFT


@pytest.mark.parametrize("alpha", [2.0, 4.0, 7.5])
@lora_and_dora
def test_outputs_are_pefts(alpha: float, dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model = cogvideox()
    add_lora(model, Lora(rank=4, alpha=alpha, dora=dora), seed=0)
    shake(model)
    plain = cogvideox()
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"], use_dora=dora)  # type: ignore[arg-type]
    inject_adapter_in_model(config, plain.transformer)
    set_peft_model_state_dict(plain.transformer, adapter_state(model))
    effect = (output(model) - output(cogvideox())).norm()
    assert (output(plain) - output(model)).norm() < 1e-5 * effect


@every_model
@lora_and_dora
def test_merged_weights_make_the_same_output_under_the_old_names(make: Callable[[], nn.Module], dora: bool) -> None:
    model = make()
    add_lora(model, Lora(rank=4, alpha=2.0, dora=dora), seed=0)
    shake(model)
    merged = make()
    base = output(merged)
    dtypes = {k: v.dtype for k, v in network_of(merged).state_dict().items()}
    weights = dict(merged_weights(model))
    assert {k: v.dtype for k, v in weights.items()} == dtypes
    network_of(merged).load_state_dict(weights)
    effect = (output(model) - base).float()
    bf16 = any(d == torch.bfloat16 for d in dtypes.values())
    difference = (output(merged) - output(model)).float()
    assert difference.norm() < (0.5 if bf16 else 1e-5) * effect.norm()
    assert abs((difference * effect).sum() / effect.square().sum()) < (0.1 if bf16 else 1e-5)  # at full strength


def test_merging_without_adapters_is_the_model_itself() -> None:
    model = cogvideox()
    weights = dict(merged_weights(model))
    state = model.transformer.state_dict()
    assert list(weights) == list(state) and all(
        weights[k] is not None and torch.equal(weights[k], state[k]) for k in state
    )


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's, of every second adapter
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_diffusers_puts_another_adapter_beside_ours(weights: str) -> None:
    """As when a model in training is drawn from with more adapters."""
    model = cogvideox(weights)
    add_lora(model, Lora(rank=4, alpha=2.0), seed=0)
    shake(model)
    base, once = output(cogvideox(weights)), output(model)
    model.transformer.load_lora_adapter(adapter_of(model).scaled().state, prefix=None, adapter_name="other")
    model.transformer.set_adapters(["default", "other"], [0.5, 0.5])
    assert (output(model) - once).norm() < (1e-5 if weights == "fp32" else 0.3) * (once - base).norm()
    model.transformer.delete_adapters("other")
    model.transformer.set_adapters(["default"], [1.0])
    assert torch.equal(output(model), once)


# ---- over a quantised base


@lora_and_dora
def test_adapters_train_over_int8_weights_and_are_not_merged_into_them(dora: bool) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = cogvideox("bf16").train()
    quantize_(model.transformer.transformer_blocks, Int8WeightOnlyConfig())
    before = output(model)
    add_lora(model, Lora(rank=4, dora=dora), seed=0)
    assert type(dict(lora_layers(model))[ATTENTION[0]].get_base_layer().weight).__name__ == "Int8Tensor"
    assert torch.equal(output(model), before)
    assert {t.dtype for t in adapter_state(model).values()} == {torch.float32}
    losses = fit(model, 12)
    assert losses[-1] < 0.98 * losses[0]
    with pytest.raises(ValueError, match=r"norm1.linear.weight: quantised \(Int8Tensor, .*without quantisation"):
        dict(merged_weights(model))


def test_our_own_quantised_weights_are_not_merged_into_either() -> None:
    model = cogvideox("bf16")
    add_lora(model, Lora(rank=4), seed=0)
    network = network_of(model)
    network.transformer_blocks[0].ff.net[2] = QuantizedLinear(network.transformer_blocks[0].ff.net[2], "nf4", CPU)
    with pytest.raises(ValueError, match=r"0.ff.net.2.weight: quantised \(Tensor, torch.uint8\)"):
        dict(merged_weights(model))


# ---- starting from an adapter


@lora_and_dora
def test_start_from_an_adapter_of_another_alpha(tmp_path: Path, dora: bool) -> None:
    """The output is the adapter's, whatever alpha / rank the new run has."""
    source = cogvideox()
    add_lora(source, Lora(rank=4, alpha=2.0, dora=dora), seed=0)
    shake(source)
    base, there = output(cogvideox()), output(source)
    files = [write_diffusers(tmp_path, adapter_of(source)).name]
    if not dora:
        write_kohya(tmp_path / "comfy.safetensors", adapter_of(source))
        files.append("comfy.safetensors")
    for file in files:
        for alpha in (2.0, 4.0, 12.0):
            model = cogvideox()
            add_lora(model, Lora(rank=4, alpha=alpha, dora=dora, init_from=str(tmp_path / file)), seed=5)
            assert (output(model) - there).norm() < 1e-5 * (there - base).norm()
    same = cogvideox()
    add_lora(same, Lora(rank=4, alpha=2.0, dora=dora, init_from=str(tmp_path / files[0])), seed=5)
    assert all(torch.equal(v, adapter_state(same)[k]) for k, v in adapter_state(source).items())


def test_an_adapter_that_does_not_fit_the_recipe(tmp_path: Path) -> None:
    source = cogvideox()
    add_lora(source, Lora(rank=4), seed=0)
    start = Lora(rank=4, init_from=str(write_diffusers(tmp_path, adapter_of(source))))
    for lora, told in [
        (replace(start, rank=8), r"init_from=.*8 things do not fit:\n  .*of rank 4, lora.rank=8"),
        (replace(start, targets="attention+mlp"), r"4 things do not fit:\n  .*ff.net.0.proj: not in the adapter"),
        (replace(start, targets="to_q"), r"6 things do not fit:\n  .*not among lora.targets='to_q'"),
        (replace(start, dora=True), "it is no DoRA: set lora.dora=false"),
        (replace(start, init_alpha=8.0), "was trained with alpha 4 by its own account, not 8"),
        (replace(start, init_from=str(tmp_path / "absent")), "no such adapter"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            add_lora(cogvideox(), lora, seed=0)


def test_warnings_of_pefts_are_not_ours() -> None:
    """pytest makes them errors; a user would see one for each layer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add_lora(cogvideox("bf16"), Lora(rank=4, dora=True), seed=0)
    assert not caught
