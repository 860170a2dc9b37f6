from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mutoscope.data.buckets import Batches, iterate_once
from mutoscope.data.dataset import Clips, VideoDataset, content_hash, make_loader, to_pixels, to_uint8
from mutoscope.data.flying_mnist import PRESETS, render
from mutoscope.data.layouts import Clip
from mutoscope.data.video import VideoError, write_video
from mutoscope.recipe import Data

LENGTHS = [8, 9, 15, 16, 25]


def painted(clip: int, count: int) -> np.ndarray:
    """Frames 16 × 24 that say who they are: red is 10 × the clip's number, green 10 × the frame's."""
    frames = np.zeros((count, 16, 24, 3), np.uint8)
    frames[..., 0], frames[..., 1] = 10 * clip, 10 * np.arange(count)[:, None, None]
    return frames


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Clips 0 to 4 at 10 fps; clip k has LENGTHS[k] frames, label k and a caption."""
    (tmp_path / "train").mkdir()
    for k, count in enumerate(LENGTHS):
        write_video(tmp_path / f"train/{k}.mp4", painted(k, count), 10, lossless=True)
        (tmp_path / f"train/{k}.txt").write_text(f"clip {k}")
        (tmp_path / f"train/{k}.json").write_text(f'{{"label": {k}}}')
    return Data(root=str(tmp_path), frames=8, height=16, width=24, val_fraction=0.0)


def shown(video: torch.Tensor) -> tuple[int, list[int]]:
    """Which clip and which of its frames these are."""
    return int(video[0, 0, 0, 0]) // 10, (video[:, 0, 0, 1] // 10).tolist()


def test_first_window(data: Data) -> None:
    dataset = VideoDataset(data, "train", seed=0)
    assert len(dataset) == 5
    sample = dataset[2, 77]
    assert (sample.id, sample.sample, sample.caption, sample.label) == ("train/2", 77, "clip 2", 2)
    np.testing.assert_array_equal(sample.video, painted(2, 8))


def test_all_windows_are_items_without_overlap(data: Data) -> None:
    dataset = VideoDataset(replace(data, window="all"), "train", seed=0)
    assert [i.id.removeprefix("train/") for i in dataset.items] == [
        "0#0", "1#0", "2#0", "3#0", "3#1", "4#0", "4#1", "4#2"]  # fmt: skip
    assert [shown(dataset[k, 0].video) for k in (3, 4, 7)] == [
        (3, list(range(8))), (3, list(range(8, 16))), (4, list(range(16, 24)))]  # fmt: skip


def test_random_windows_hang_on_the_seed_and_the_sample_alone(data: Data) -> None:
    data = replace(data, window="random")
    one, same, other = (VideoDataset(data, "train", seed) for seed in (0, 0, 1))
    windows = lambda dataset, order: {n: shown(dataset[4, n].video)[1] for n in order}
    drawn = windows(one, range(110))
    assert drawn == windows(same, reversed(range(110)))
    assert drawn != windows(other, range(110))
    assert {w[0] for w in drawn.values()} == set(range(18))  # 25 - 8 + 1 places, all of them.
    assert all(w == list(range(w[0], w[0] + 8)) for w in drawn.values())


def test_resampling(data: Data) -> None:
    assert shown(VideoDataset(replace(data, fps=5.0), "train", 0)[4, 0].video)[1] == list(range(0, 16, 2))
    windows = VideoDataset(replace(data, fps=20.0, window="all"), "train", 0)
    assert sum(i.clip.id == "train/0" for i in windows.items) == 2  # 8 frames become 16.
    assert shown(windows[1, 0].video)[1] == [4, 4, 5, 5, 6, 6, 7, 7]


def test_resizing(data: Data) -> None:
    sample = VideoDataset(replace(data, height=24, width=24, resize="pad"), "train", 0)[4, 0]
    assert sample.video.shape == (8, 24, 24, 3)
    assert (sample.video[:, [0, -1]] == 0).all() and shown(sample.video[:, 4:])[0] == 4


def test_short_clips_are_named_with_their_length(data: Data) -> None:
    dataset = VideoDataset(replace(data, frames=12), "train", 0)
    with pytest.raises(VideoError, match=r"train/1\.mp4: too short: 9 frames, data\.frames is 12"):
        dataset[1, 0]
    with pytest.raises(VideoError, match=r"0\.mp4: too short: 4 frames at 5 fps"):
        VideoDataset(replace(data, fps=5.0, window="all"), "train", 0)


def test_the_cache_decodes_once(data: Data) -> None:
    kept, fresh = (VideoDataset(replace(data, cache=c), "train", 0) for c in (True, False))
    kept[3, 0]
    write_video(kept.items[3].clip.path, painted(9, 16), 10, lossless=True)
    assert shown(kept[3, 5].video) == (3, list(range(8))) and kept[3, 5].sample == 5
    assert shown(fresh[3, 5].video)[0] == 9
    with pytest.raises(ValueError, match=r'data\.cache keeps one window .* data\.window="random"'):
        VideoDataset(replace(data, cache=True, window="random"), "train", 0)


def test_labels_out_of_range_and_empty_splits_are_refused(data: Data) -> None:
    with pytest.raises(ValueError, match=r"3\.mp4: label 3, but data\.num_labels=3 allows 0 to 2 \(2 such clips"):
        VideoDataset(replace(data, num_labels=3), "train", 0)
    assert VideoDataset(replace(data, num_labels=5), "train", 0)[4, 0].label == 4
    with pytest.raises(ValueError, match=r"no clips in val \(data\.val_fraction=0\.0\)"):
        VideoDataset(data, "val", 0)


def equal(a: Clips, b: Clips) -> bool:
    same = (a.ids, a.samples, a.captions, a.labels.tolist()) == (b.ids, b.samples, b.captions, b.labels.tolist())
    return same and torch.equal(a.video, b.video)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # More workers than cores.
def test_workers_change_nothing(data: Data) -> None:
    (Path(data.root) / "train/bad.mp4").write_text("no video")
    (Path(data.root) / "train/bad.txt").write_text("a clip that breaks")
    dataset = VideoDataset(replace(data, window="random"), "train", seed=5)
    good = list(islice(Batches(size=5, batch_size=3, seed=5), 7))
    clips: dict[int, list[Clips]] = {0: [], 1: [], 2: []}
    for workers, read in clips.items():
        # In the end neither a traceback of the worker's nor a hang.
        with pytest.raises(VideoError, match=r"^\S+train/bad\.mp4: can't be read as a video: [^\n]*$"):
            for batch in make_loader(dataset, [*good, [(5, 21)]], workers):
                read.append(batch)
    assert [b.samples for b in clips[0]] == [[n for _, n in batch] for batch in good]
    assert clips[0][0].video.shape == (3, 8, 16, 24, 3)
    assert all(map(equal, clips[0], clips[1])) and all(map(equal, clips[0], clips[2]))
    assert len(clips[1]) == len(clips[2]) == 7


def test_a_resumed_loader_goes_on_as_if_it_had_not_stopped(data: Data) -> None:
    dataset = VideoDataset(replace(data, window="random"), "train", seed=5)
    whole = Batches(size=len(dataset), batch_size=2, seed=5)
    expected = list(islice(make_loader(dataset, whole), 5))[3:]
    assert all(map(equal, make_loader(dataset, replace(whole, start=6)), expected))


def test_the_loader_leaves_the_global_generator_alone(data: Data) -> None:
    before = torch.get_rng_state()
    dataset = VideoDataset(data, "train", 0)
    next(make_loader(dataset, iterate_once(len(dataset), 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_survive_the_way_there_and_back() -> None:
    video = torch.arange(2 * 3 * 4 * 4 * 3).remainder(256).byte().reshape(2, 3, 4, 4, 3)
    pixels = to_pixels(video)
    assert pixels.shape == (2, 3, 3, 4, 4) and pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert pixels[1, 2, 0, 3, 1] == video[1, 0, 3, 1, 2] / 127.5 - 1
    assert torch.equal(to_uint8(pixels), video)
    assert to_uint8(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_flying_mnist_in_memory() -> None:
    dataset = VideoDataset(Data(root="flying-mnist://tiny", frames=4, height=16, width=16, num_labels=10), "val", 0)
    drawn = render(PRESETS["tiny"], "val", 5)
    sample = dataset[5, 0]
    np.testing.assert_array_equal(sample.video, drawn.frames)
    assert (sample.id, sample.caption, sample.label) == ("val/00005", drawn.caption, drawn.digits[0].digit)
    halves = VideoDataset(replace(dataset.data, frames=2, window="all"), "val", 0)
    np.testing.assert_array_equal(halves[11, 0].video, drawn.frames[2:])


def test_content_hashes_follow_the_content(tmp_path: Path) -> None:
    for name, clip in (("a", 1), ("b", 1), ("c", 2)):
        write_video(tmp_path / f"{name}.mp4", painted(clip, 4), 10, lossless=True)
    a, b, c = (Clip(id=n, path=str(tmp_path / f"{n}.mp4"), split="train") for n in "abc")
    assert content_hash(a) == content_hash(b)  # The name does not matter,
    memory = [Clip(id=p, path=f"flying-mnist://{p}", split="train") for p in
              ("tiny/train/00001", "tiny/train/00002", "tiny/val/00001", "demo/train/00001")]  # fmt: skip
    different = [content_hash(a), content_hash(c), content_hash(a, 0), content_hash(a, 1),
                 content_hash(replace(a, start=0.1)), content_hash(replace(a, end=0.2)),
                 *map(content_hash, memory)]  # fmt: skip
    assert len(set(different)) == len(different)  # all of this does,
    before = content_hash(a)
    write_video(tmp_path / "a.mp4", painted(3, 5), 10, lossless=True)
    assert content_hash(a) != before  # and so do new bytes.
    assert all(len(h) == 32 for h in different)
    with pytest.raises(VideoError, match=r"nowhere\.mp4: No such file"):
        content_hash(replace(a, path="nowhere.mp4"))
