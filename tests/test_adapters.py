"""Adapters of every trainer, read at the strength they were trained at or refused; ours, as every reader takes them.

The rows of the table of layouts: A saved without alpha (CogVideo's trainer, cogvideox-factory), B with diffusers'
header, C by save_lora_adapter, D with kohya's alphas, E alpha worked in, F PEFT's folder, G PEFT's config beside A.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mutoscope.adapters import Adapter, read_adapter, write_diffusers, write_kohya, write_peft
from mutoscope.checkpoints import open_checkpoint
from mutoscope.recipe import Lora
from mutoscope.training.lora import adapter_of, add_lora, load_adapter_state

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, ALPHA = 8, 4.0


def transformer() -> CogVideoXTransformer3DModel:
    folder = open_checkpoint("tiny://cogvideox-2b")
    return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32).eval()


def output(network: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 3, 4, 4, 6, generator=g), torch.randn(1, 32, 32, generator=g)
    with torch.no_grad():
        out: Tensor = network(x, text, torch.tensor([500]), return_dict=False)[0]
    return out


@pytest.fixture(scope="module")
def trained() -> CogVideoXTransformer3DModel:
    """As upstream's trainers leave one."""
    network = transformer()
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS))
    g = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
    return network


def adapter_in(network: nn.Module) -> Adapter:
    state = {k: v.clone() for k, v in get_peft_model_state_dict(network).items()}
    return Adapter(state=state, alphas={k.removesuffix(".lora_A.weight"): ALPHA for k in state if "lora_A" in k})


def error(network: nn.Module, trained: nn.Module) -> float:
    """|output − trained| over the adapter's effect: 0 identical, about 1 for none, or for twice the strength."""
    wanted = output(trained)
    return float((output(network) - wanted).norm() / (wanted - output(transformer())).norm())


def applied(adapter: Adapter) -> nn.Module:
    """A fresh network with an adapter that was read, by our own way."""
    network = transformer()
    rank = next(iter(adapter.ranks.values()))
    targets = "|".join(f"^{name}$" for name in adapter.alphas)
    add_lora(network, Lora(rank=rank, alpha=float(rank), targets=targets, dora=adapter.dora), seed=0)
    load_adapter_state(network, adapter.scaled().state, source="test")
    return network


# ---- what others wrote


def save_row(row: str, trained: CogVideoXTransformer3DModel, folder: Path) -> Path:
    """Write the trained adapter as the row's writer does, by that writer's own code where we have it."""
    state = get_peft_model_state_dict(trained)
    prefixed = {f"transformer.{k}": v.contiguous() for k, v in state.items()}
    folder.mkdir(exist_ok=True)
    if row in "AG":
        CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=state)
    if row == "B":
        metadata = trained.peft_config["default"].to_dict()
        CogVideoXPipeline.save_lora_weights(
            folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
    if row == "C":
        trained.save_lora_adapter(folder)
    if row == "D":
        alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(ALPHA) for k in prefixed if "lora_A" in k}
        save_file(prefixed | alphas, folder / "d.safetensors")
    if row == "F":
        save_file(
            {f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors"
        )
    if row in "FG":
        LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS).save_pretrained(str(folder))
    if row == "kohya":
        kohya = {}
        for key, tensor in state.items():
            name = "lora_unet__" + key.partition(".lora_")[0].replace(".", "_")
            kohya[f"{name}.lora_{'down' if 'lora_A' in key else 'up'}.weight"] = tensor.contiguous()
            kohya[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=torch.bfloat16)
        save_file(kohya, folder / "fun.safetensors")
    if row == "VideoX-Fun":
        names = {"lora_A": "lora_down", "lora_B": "lora_up"}
        flat = {
            f"diffusion_model.{k.replace(old, new)}": v.contiguous()
            for k, v in state.items()
            for old, new in names.items()
            if old in k
        }
        save_file(
            flat | {f"diffusion_model.{k.partition('.lora_')[0]}.alpha": torch.tensor(ALPHA) for k in state},
            folder / "fun.safetensors",
        )
    return folder


ORIGIN = {"A": "diffusers", "B": "diffusers", "C": "diffusers", "D": "diffusers", "F": "PEFT", "G": "diffusers",
          "kohya": "kohya", "VideoX-Fun": "kohya"}  # fmt: skip


@pytest.mark.parametrize("row", ORIGIN)
def test_every_writers_adapter_is_read_at_its_strength(
    row: str, trained: CogVideoXTransformer3DModel, tmp_path: Path
) -> None:
    path = save_row(row, trained, tmp_path / row)
    adapter = read_adapter(path, transformer(), alpha=ALPHA if row == "A" else None)
    assert (adapter.origin, set(adapter.ranks.values()), set(adapter.alphas.values())) == (ORIGIN[row], {RANK}, {ALPHA})
    assert error(applied(adapter), trained) < 1e-5


def test_an_adapter_without_alpha_is_refused_with_the_likely_ones(
    trained: CogVideoXTransformer3DModel, tmp_path: Path
) -> None:
    """Upstream's defect: diffusers takes alpha = rank, and what was trained at half strength comes out at twice it."""
    path = save_row("A", trained, tmp_path / "a")
    pipeline_like = transformer()
    pipeline_like.load_lora_adapter(str(path), prefix="transformer", use_safetensors=True)
    assert error(pipeline_like, trained) > 0.5
    with pytest.raises(
        ValueError, match=r"of rank 8, and does not say .* Give it: 8 if by cogvideox-factory .* 4 if by CogVideo"
    ):
        read_adapter(path, transformer())


def test_an_alpha_against_the_files_own_is_refused(trained: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    for row in "BCDFG":
        path = save_row(row, trained, tmp_path / row)
        assert read_adapter(path, transformer(), alpha=ALPHA).alphas  # the same may be said again
        with pytest.raises(ValueError, match="alpha 4 by its own account, not 8"):
            read_adapter(path, transformer(), alpha=8.0)


def test_rslora_and_alphas_by_layer(trained: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    path = save_row("F", trained, tmp_path / "f")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_adapter(path, transformer()).scales["transformer_blocks.0.attn1.to_q"] == pytest.approx(4 / 8**0.5)
    patterns = {"alpha_pattern": {r"transformer_blocks.1.attn1.to_q": 2, "to_k": 16}}
    (path / "adapter_config.json").write_text(json.dumps(config | patterns))
    alphas = read_adapter(path, transformer()).alphas
    assert {name.partition("blocks.")[2]: a for name, a in alphas.items() if a != ALPHA} == {
        "1.attn1.to_q": 2.0, "0.attn1.to_k": 16.0, "1.attn1.to_k": 16.0,
    }  # fmt: skip
    fresh = PeftModel.from_pretrained(transformer(), str(path))
    scaling = {
        name: module.scaling["default"]
        for name, module in fresh.base_model.model.named_modules()
        if hasattr(module, "scaling")
    }
    assert scaling == read_adapter(path, transformer()).scales


def test_a_dora_of_peft_is_read(tmp_path: Path) -> None:
    network = transformer()
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=TARGETS, use_dora=True))
    g = torch.Generator().manual_seed(1)
    for name, p in network.named_parameters():
        if "lora_" in name:
            p.data.add_(0.1 * torch.randn(p.shape, generator=g))
    network.save_lora_adapter(tmp_path)
    adapter = read_adapter(tmp_path, transformer())
    assert adapter.dora and error(applied(adapter), network) < 1e-5


# ---- what cannot be read


def no_such(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.zeros(4, 32), f"{name}.lora_B.weight": torch.zeros(32, 4)}


TO_Q = "transformer_blocks.0.attn1.to_q"
SAT = "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({SAT: torch.zeros(4, 32)}, "a checkpoint of SAT"),
        ({f"{TO_Q}.lokr_w1": torch.zeros(4, 4)}, "a LoKr, LoHa, OFT or IA3"),
        ({f"{TO_Q}.hada_w1_a": torch.zeros(4, 4)}, "a LoKr, LoHa, OFT or IA3"),
        (no_such(TO_Q) | {f"{TO_Q}.dora_scale": torch.zeros(32, 1)}, "a DoRA of kohya's kind"),
        (no_such(TO_Q) | {"text_encoder.encoder.lora_A.weight": torch.zeros(4, 32)}, "an adapter of the text encoder"),
        ({"lora_te_layers_0.lora_down.weight": torch.zeros(4, 32)}, "an adapter of the text encoder"),
        (no_such(TO_Q) | {f"{TO_Q}.diff_b": torch.zeros(32)}, "full weight differences"),
        (no_such(TO_Q) | {f"{TO_Q}.lora_B.bias": torch.zeros(32)}, "a LoRA with biases"),
        ({}, "it adapts nothing"),
        ({"transformer.proj_out.weight": torch.zeros(3)}, "1 of 1 keys are no LoRA's:\n  transformer.proj_out.weight"),
        (no_such("transformer_blocks.9.attn1.to_q"), r"1 faults\n  \S+: no such linear layer; did you mean"),
        (no_such("transformer_blocks.0.attn1.norm_q"), "no such linear layer"),
        ({f"{TO_Q}.lora_A.weight": torch.zeros(4, 32)}, "only a part of its LoRA is there"),
        (no_such(TO_Q) | {f"{TO_Q}.lora_B.weight": torch.zeros(64, 4)}, r"the layer wants \(4, 32\) and \(32, 4\)"),
        (no_such(TO_Q) | {f"{TO_Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, "not finite"),
        ({"lora_unet__blocks_0_self_attn_q.lora_down.weight": torch.zeros(4, 32)}, "are of no linear layer here"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_this_network(state: dict[str, Tensor], told: str, tmp_path: Path) -> None:
    """diffusers loads most of these silently, as nothing or as a part."""
    save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=told):
        read_adapter(tmp_path / "f.safetensors", transformer(), alpha=4.0)


def test_a_header_that_is_no_table(tmp_path: Path) -> None:
    for text, told in (("{", "not JSON"), ("3", "not a table: 3")):
        save_file(no_such(TO_Q), tmp_path / "f.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(ValueError, match=f"f.safetensors: what it says of the adapter is {told}"):
            read_adapter(tmp_path / "f.safetensors", transformer())


def test_paths_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        read_adapter(tmp_path / "absent", transformer())
    with pytest.raises(ValueError, match="found nothing; name the file"):
        read_adapter(tmp_path, transformer())
    (tmp_path / "x.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="can run code and are not opened"):
        read_adapter(tmp_path / "x.bin", transformer())
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"found a.safetensors, b.safetensors, x.bin; name the file"):
        read_adapter(tmp_path, transformer())
    with pytest.raises(ValueError, match="damaged, or not a safetensors file"):
        read_adapter(tmp_path / "a.safetensors", transformer())


# ---- what we write


@settings(max_examples=25)
@given(rank=st.integers(1, 32), alpha=st.floats(0.25, 300), layers=st.integers(1, 2))
def test_written_and_read_is_the_same_update(
    rank: int, alpha: float, layers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    network = nn.ModuleDict({f"q_{i}": nn.Linear(6, 5) for i in range(layers)})
    state = {}
    for i in range(layers):
        state |= {f"q_{i}.lora_A.weight": torch.randn(rank + i, 6), f"q_{i}.lora_B.weight": torch.randn(5, rank + i)}
    adapter = Adapter(state=state, alphas={f"q_{i}": alpha * (i + 1) for i in range(layers)}, about={"step": "3"})
    folder = tmp_path_factory.mktemp("written")
    write_kohya(folder / "kohya.safetensors", adapter)
    write_peft(folder, adapter)
    write_diffusers(folder, adapter)
    for name in ("kohya.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        read = read_adapter(folder / name, network)
        assert read.about == {"step": "3"}
        for i in range(layers):
            update = lambda a, m=f"q_{i}": a.scales[m] * (a.state[f"{m}.lora_B.weight"] @ a.state[f"{m}.lora_A.weight"])
            torch.testing.assert_close(update(read), update(adapter), rtol=1e-4, atol=1e-5)
            assert read.scales[f"q_{i}"] == 1


def test_alphas_and_ranks_by_layer_reach_diffusers_and_peft(tmp_path: Path) -> None:
    network = transformer()
    state, g = {}, torch.Generator().manual_seed(1)
    for rank, name in ((2, "to_q"), (4, "to_k"), (4, "to_v")):
        for block in (0, 1):
            module = f"transformer_blocks.{block}.attn1.{name}"
            state[f"{module}.lora_A.weight"] = 0.3 * torch.randn(rank, 32, generator=g)
            state[f"{module}.lora_B.weight"] = 0.3 * torch.randn(32, rank, generator=g)
    modules = [k.removesuffix(".lora_A.weight") for k in state if "lora_A" in k]
    adapter = Adapter(state=state, alphas={module: 1.0 + i for i, module in enumerate(modules)})
    with torch.no_grad():
        for module in modules:
            weight = network.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            weight += adapter.scales[module] * state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]
    write_diffusers(tmp_path, adapter)
    loaded = transformer()
    loaded.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    assert error(loaded, network) < 1e-5
    loaded = transformer()  # and by a diffusers that does not know the header
    loaded.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix="transformer")
    assert error(loaded, network) < 1e-5
    loaded = transformer()
    PeftModel.from_pretrained(loaded, str(write_peft(tmp_path / "peft", adapter)))
    assert error(loaded, network) < 1e-5


def test_the_header_says_what_diffusers_asks_for(trained: CogVideoXTransformer3DModel, tmp_path: Path) -> None:
    about = {"base_model": "THUDM/CogVideoX-2b", "step": "500", "learned_positions": "false", "id_token": "DISNEY"}
    adapter = adapter_in(trained)
    path = write_diffusers(tmp_path, Adapter(state=adapter.state, alphas=adapter.alphas, about=about))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        assert json.loads(file.metadata()["mutoscope"]) == about
    assert header["transformer.r"] == header["transformer.lora_alpha"] == RANK
    assert header["transformer.target_modules"] == sorted(adapter.alphas)
    assert all(isinstance(header[f"transformer.{key}"], int) for key in ("r", "lora_alpha"))
    assert all(key.startswith("transformer.") for key in header)  # LoraConfig(**header) takes no others
    _, metadata = CogVideoXPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert metadata == header
    assert read_adapter(path, transformer()).about == about


def test_half_precision_is_for_the_matrices_not_for_doras_magnitudes(tmp_path: Path) -> None:
    network = transformer()
    add_lora(network, Lora(rank=4, dora=True), seed=0)
    write_diffusers(tmp_path, adapter_of(network), torch.bfloat16)
    kinds = {
        k.partition("lora_")[2]: v.dtype for k, v in load_file(tmp_path / "pytorch_lora_weights.safetensors").items()
    }
    assert kinds == {"A.weight": torch.bfloat16, "B.weight": torch.bfloat16, "magnitude_vector": torch.float32}


def test_a_dora_is_not_for_comfyui(tmp_path: Path) -> None:
    state = no_such("q") | {"q.lora_magnitude_vector": torch.ones(32)}
    with pytest.raises(ValueError, match=r"a DoRA cannot be written for ComfyUI.*--to full"):
        write_kohya(tmp_path / "f.safetensors", Adapter(state=state, alphas={"q": 4.0}))
    assert not list(tmp_path.iterdir())
