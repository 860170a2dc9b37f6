"""Checkpoints in diffusers' format: loaded as diffusers loads them, or refused with the reason; tiny ones on demand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mutoscope import checkpoints, tiny_checkpoints
from mutoscope.checkpoints import (
    hash_part,
    load_part,
    open_checkpoint,
    part_config,
    scheduler_fields,
    weight_files,
)
from mutoscope.known_checkpoints import KNOWN, TINY
from mutoscope.tiny_checkpoints import make_tiny

FP32 = torch.float32
WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of tiny://cogvideox-t2v to spoil."""
    return Path(shutil.copytree(make_tiny("cogvideox-t2v"), tmp_path / "checkpoint"))


def edit(file: Path, **changes: Any) -> None:
    """Change a JSON file; None removes a key."""
    tree = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def reference(folder: Path, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """The part as diffusers and transformers load it."""
    import diffusers
    import transformers

    cls: Any = {
        "transformer": diffusers.CogVideoXTransformer3DModel,
        "vae": diffusers.AutoencoderKLCogVideoX,
        "text_encoder": transformers.T5EncoderModel,
    }[part]
    loaded: torch.nn.Module = cls.from_pretrained(folder, subfolder=part, torch_dtype=dtype)
    return loaded


# ---------------------------------------------------------------- tiny checkpoints


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_checkpoint_is_a_pipeline(name: str) -> None:
    from diffusers import DiffusionPipeline

    folder = open_checkpoint(f"tiny://{name}")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert ("ImageToVideo" in type(pipeline).__name__) == ("i2v" in name)
    for part, config in TINY[name].items():
        if part != "tokenizer":
            saved = json.loads(
                (folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")).read_text()
            )
            assert {k: v for k, v in config.items() if k in saved} == {k: saved[k] for k in config if k in saved}
            assert part_config(f"tiny://{name}", part).items() >= config.items()
    assert sum(p.numel() for p in pipeline.vae.parameters()) == 65_195
    assert 88_144 <= sum(p.numel() for p in pipeline.transformer.parameters()) < 100_000


def test_tiny_checkpoints_are_the_same_wherever_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    first = [hash_part("tiny://cogvideox-2b", part) for part in WEIGHTS]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert make_tiny("cogvideox-2b").is_relative_to(tmp_path)
    assert [hash_part("tiny://cogvideox-2b", part) for part in WEIGHTS] == first
    assert torch.equal(torch.get_rng_state(), before), "making one draws from the global generator"


def test_a_tiny_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def killed(name: str, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_checkpoints, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_tiny("cogvideox-t2v")
    assert not list(tiny_checkpoints.cache_folder().iterdir())

    final = tiny_checkpoints.cache_folder() / f"cogvideox-t2v-v{tiny_checkpoints.VERSION}"

    def overtaken(name: str, folder: Path) -> None:
        (folder / "mine").touch()
        final.mkdir()
        (final / "theirs").touch()

    monkeypatch.setattr(tiny_checkpoints, "_write", overtaken)
    assert make_tiny("cogvideox-t2v") == final
    assert [f.name for f in final.iterdir()] == ["theirs"]
    assert list(tiny_checkpoints.cache_folder().iterdir()) == [final]


def test_there_are_no_other_tiny_checkpoints() -> None:
    with pytest.raises(ValueError, match="did you mean cogvideox-i2v"):
        open_checkpoint("tiny://cogvideo-i2v")


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", WEIGHTS)
def test_parts_load_as_their_own_libraries_load_them(part: str, dtype: torch.dtype) -> None:
    ours, theirs = load_part("tiny://cogvideox-i2v", part, dtype), reference(make_tiny("cogvideox-i2v"), part, dtype)
    assert type(ours) is type(theirs)
    assert not ours.training
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name].to(dtype), rtol=0, atol=0, msg=name)


def test_tied_weights_stay_tied() -> None:
    model: Any = load_part("tiny://cogvideox-t2v", "text_encoder", FP32)
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_shards_load_as_one_file_does(copy: Path) -> None:
    whole = load_part(str(copy), "transformer", FP32)
    model: Any = reference(copy, "transformer", FP32)
    shutil.rmtree(copy / "transformer")
    model.save_pretrained(copy / "transformer", max_shard_size="100KB")
    files = weight_files(copy / "transformer")
    assert len(files) > 2
    sharded = load_part(str(copy), "transformer", FP32).state_dict()
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.state_dict().items())

    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of {len(files)} shards are missing:\s+{files[1].name}"):
        load_part(str(copy), "transformer", FP32)


def test_an_index_does_not_lead_out_of_its_folder(copy: Path) -> None:
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        load_part(str(copy), "transformer", FP32)


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda w: w.pop("proj_out.bias"), r"1 missing:\s+proj_out.bias"),
    "unexpected": (lambda w: w.update({f"lora.{i:02}": torch.zeros(1) for i in range(12)}),
                   r"12 unexpected:(\n  lora\.0\d){10}\n  \.\.\. and 2 more"),
    "of another shape": (lambda w: w.update({"proj_out.bias": torch.zeros(5)}),
                         r"1 of another shape:\s+proj_out.bias: \[5\], not \[16\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_every_key_is_accounted_for(fault: str, copy: Path) -> None:
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change, told = SPOILT[fault]
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=told):
        load_part(str(copy), "transformer", FP32)


def test_a_damaged_file_is_named(copy: Path) -> None:
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file}: damaged"):
        load_part(str(copy), "vae", FP32)


def test_pickles_are_not_opened(copy: Path) -> None:
    folder = copy / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles"):
        load_part(str(copy), "transformer", FP32)
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_part(str(copy), "transformer", FP32)


def test_only_classes_known_here_are_made(copy: Path) -> None:
    code = {"auto_map": {"AutoModel": "evil.Evil"}}
    (copy / "transformer" / "evil.py").write_text("raise SystemExit('remote code was run')")
    edit(copy / "transformer" / "config.json", **code)
    load_part(str(copy), "transformer", FP32)
    edit(copy / "transformer" / "config.json", _class_name="WanTransformer3DModel", **code)
    with pytest.raises(ValueError, match="its transformer is a WanTransformer3DModel"):
        load_part(str(copy), "transformer", FP32)


def test_keys_that_older_files_lack_have_their_defaults(copy: Path) -> None:
    edit(copy / "transformer" / "config.json", patch_size_t=None, ofs_embed_dim=None, patch_bias=None)
    config = part_config(str(copy), "transformer")
    assert (config["patch_size_t"], config["ofs_embed_dim"], config["patch_bias"]) == (None, None, True)
    load_part(str(copy), "transformer", FP32)


def test_defaults_are_those_of_the_classes() -> None:
    import inspect

    import diffusers

    for part in ("transformer", "vae", "scheduler"):
        defaults = checkpoints.DEFAULTS[part]
        cls = getattr(diffusers, defaults["_class_name"])
        theirs = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()}
        for key, value in defaults.items():
            if key != "_class_name":
                assert theirs[key] == (tuple(value) if isinstance(value, list) else value), key


# ---------------------------------------------------------------- what is at a path


def lora(folder: Path) -> None:
    (folder / "pytorch_lora_weights.safetensors").touch()


def sat(folder: Path) -> None:
    (folder / "1000").mkdir()
    (folder / "1000" / "mp_rank_00_model_states.pt").touch()


def part(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')


def other(folder: Path) -> None:
    (folder / "notes.txt").touch()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lora, "a LoRA adapter; give the model that it was trained on"),
        (sat, "a SAT checkpoint"),
        (part, r"one part of a checkpoint \(CogVideoXTransformer3DModel\); give the folder above"),
        (other, "a folder of notes.txt"),
        (lambda folder: None, "an empty folder"),
    ],
)
def test_what_is_no_checkpoint_is_named(make: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=told):
        open_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match=told):
        load_part(str(tmp_path), "transformer", FP32)


def test_a_single_file_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="a single file"):
        load_part(str(file), "transformer", FP32)


def test_a_missing_part_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    load_part(str(copy), "transformer", FP32)
    with pytest.raises(ValueError, match="a checkpoint without this part"):
        load_part(str(copy), "vae", FP32)
    (copy / "text_encoder" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config\.json is missing"):
        load_part(str(copy), "text_encoder", FP32)


def test_the_hub_is_asked_for_the_parts_that_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(repository: str, repo_type: str, revision: None, allow_patterns: list[str]) -> str:
        assert repo_type == "model"
        asked.append((repository, allow_patterns))
        return str(make_tiny("cogvideox-t2v"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_part("somebody/cogvideox", "vae", FP32)
    assert {repository for repository, _ in asked} == {"somebody/cogvideox"}
    # The configuration comes first, alone; an autoencoder's may be in no folder
    assert asked[0][1] == ["model_index.json", "vae/config.json", "config.json"]
    files = ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
             "vae/diffusion_pytorch_model.safetensors.index.json", "vae/config.json"]  # fmt: skip
    others = ["vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/code.py",
              "transformer/config.json"]  # fmt: skip
    from huggingface_hub.utils import filter_repo_objects

    assert list(filter_repo_objects(files + others, allow_patterns=asked[1][1])) == files


def error(cls: Any) -> Exception:
    made: Exception = cls.__new__(cls)
    made.args = ("Name or service not known",)
    return made


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (GatedRepoError, "accept a licence: do so at https://huggingface.co/some/model"),
        (RepositoryNotFoundError, "no such model on the Hugging Face Hub"),
        (LocalEntryNotFoundError, r"can't be reached \(Name or service not known\); give the path of a copy"),
        (ConnectionError, "can't be reached"),
    ],
)
def test_why_the_hub_does_not_give(raised: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error(raised)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=told):
        open_checkpoint("some/model", ["vae"])


def test_what_is_no_hub_id_is_looked_for_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_checkpoint("/no/such/folder")


# ---------------------------------------------------------------- without weights


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("CogVideoX-2b", 1_693_783_872),
        ("CogVideoX-5b", 5_570_283_072),
        ("CogVideoX-5b-I2V", 5_570_479_680),
        ("CogVideoX1.5-5B", 5_570_676_352),
        ("CogVideoX1.5-5B-I2V", 5_571_594_880),
    ],
)
def test_published_models_have_their_sizes_without_files_or_network(
    name: str, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    for owner in ("THUDM", "zai-org"):
        assert f"{owner}/{name}" in KNOWN
    with torch.device("meta"):
        modules = [load_part(f"THUDM/{name}", part, torch.bfloat16) for part in WEIGHTS]
    assert [sum(p.numel() for p in m.parameters()) for m in modules] == [parameters, 215_583_907, 4_762_310_656]


def test_shapes_are_enough_under_fake_tensors() -> None:
    with FakeTensorMode():
        model = load_part("THUDM/CogVideoX-2b", "transformer", torch.bfloat16)
    weight = next(model.parameters())
    assert isinstance(weight.data, FakeTensor)
    assert weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == FP32


# ---------------------------------------------------------------- identity, schedule


def test_a_part_is_known_by_its_bytes(copy: Path, tmp_path: Path) -> None:
    before = hash_part(str(copy), "vae")
    assert before == hash_part("tiny://cogvideox-t2v", "vae")
    assert before != hash_part("tiny://cogvideox-2b", "vae")
    edit(copy / "vae" / "config.json", _diffusers_version="0.99")
    assert hash_part(str(copy), "vae") == before
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert hash_part(str(copy), "vae") != before

    words = hash_part(str(copy), "tokenizer")
    edit(copy / "tokenizer" / "tokenizer_config.json", extra_ids=7)
    assert hash_part(str(copy), "tokenizer") != words


def test_a_checkpoint_tells_how_it_was_trained(copy: Path) -> None:
    assert scheduler_fields("THUDM/CogVideoX-2b")["snr_shift_scale"] == 3.0
    assert scheduler_fields("zai-org/CogVideoX1.5-5B") == {
        "schedule": "scaled_linear",
        "prediction": "v",
        "snr_shift_scale": 1.0,
        "zero_terminal_snr": True,
        "temporal_patch": 2,
    }
    file = copy / "scheduler" / "scheduler_config.json"
    edit(file, snr_shift_scale=None)
    assert scheduler_fields(str(copy))["snr_shift_scale"] == 3.0, "diffusers' default"
    edit(file, prediction_type="epsilon")
    with pytest.raises(ValueError, match="prediction_type = 'epsilon', not 'v_prediction'"):
        scheduler_fields(str(copy))


def test_every_process_makes_a_whole_tiny_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers lets the first of several processes write, and whichever is done first puts its folder in place."""
    from transformers import PreTrainedModel

    made = {}
    for rank in (0, 1):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(rank)))
        monkeypatch.setattr(PreTrainedModel, "should_save_on_this_rank", lambda self, main, rank=rank: rank == 0)
        folder = make_tiny("cogvideox-t2v")
        made[rank] = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert made[0] == made[1]
