from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mutoscope.data.buckets import Plan, iterate_once, make_pools
from mutoscope.data.dataset import Clips, VideoDataset, content_hash, to_pixels, to_uint8
from mutoscope.data.flying_mnist import PRESETS, render
from mutoscope.data.loader import BLOCK, PackedItems, make_loader
from mutoscope.data.media import Media
from mutoscope.data.sources.layouts import Clip
from mutoscope.data.video import VideoError, write_video
from mutoscope.recipe import Bucket, Data

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
    assert shown(VideoDataset(replace(data, fps=5.0, short="drop"), "train", 0)[1, 0].video)[1] == list(range(0, 16, 2))
    windows = VideoDataset(replace(data, fps=20.0, window="all"), "train", 0)
    assert sum(i.clip.id == "train/0" for i in windows.items) == 2  # 8 frames become 16.
    assert shown(windows[1, 0].video)[1] == [4, 4, 5, 5, 6, 6, 7, 7]


def test_resizing(data: Data) -> None:
    sample = VideoDataset(replace(data, height=24, width=24, resize="pad"), "train", 0)[4, 0]
    assert sample.video.shape == (8, 24, 24, 3)
    assert (sample.video[:, [0, -1]] == 0).all() and shown(sample.video[:, 4:])[0] == 4


def test_short_clips_stop_the_start_are_left_out_or_filled_up(data: Data) -> None:
    data = replace(data, frames=12)
    with pytest.raises(
        ValueError, match=r"2 of 5 clips are too short; set data\.short.*\n.*0\.mp4: too short: 8 frames"
    ):
        VideoDataset(data, "train", 0)
    with pytest.raises(ValueError, match=r"5 of 5 clips are too short at 2 fps"):
        VideoDataset(replace(data, fps=2.0), "train", 0)
    dropped = VideoDataset(replace(data, short="drop"), "train", 0)
    assert [i.id for i in dropped.items] == ["train/2", "train/3", "train/4"] and len(dropped.left_out) == 2
    assert any("2 clips left out" in line and "1.mp4: too short: 9 frames" in line for line in dropped.report())
    looped, padded = (VideoDataset(replace(data, short=s), "train", 0) for s in ("loop", "pad"))
    assert shown(looped[1, 0].video) == (1, [*range(9), 0, 1, 2])
    assert shown(padded[1, 0].video) == (1, [*range(9), 8, 8, 8])
    assert shown(looped[4, 0].video) == shown(padded[4, 0].video) == (4, list(range(12)))


def test_intervals_and_skipped_frames(data: Data) -> None:
    spaced = VideoDataset(replace(data, frames=5, frame_interval=3, skip_frames_start=2, short="drop"), "train", 0)
    assert [i.id for i in spaced.items] == ["train/2", "train/3", "train/4"]
    assert shown(spaced[1, 0].video)[1] == [2, 5, 8, 11, 14]
    ends = VideoDataset(replace(data, frames=8, skip_frames_end=1, short="drop"), "train", 0)
    assert [i.id for i in ends.items] == ["train/1", "train/2", "train/3", "train/4"]
    drawn = VideoDataset(replace(spaced.data, window="random"), "train", 0)
    assert {shown(drawn[2, n].video)[1][0] for n in range(100)} == set(range(2, 13))  # 25 - 2 - 13 + 1 places


@pytest.mark.parametrize(("frames", "every", "interval"), [(4, 1, 1), (4, 2, 1), (3, 4, 2), (8, 1, 5), (2, 7, None)])
def test_windows_are_those_of_cosmos(data: Data, frames: int, every: int, interval: int | None) -> None:
    """Cosmos-Predict1 dataset_video.py: starts at multiples of start_frame_interval from which all frames, each
    sequence_interval after the one before, are in the video."""
    data = replace(data, frames=frames, frame_interval=every, window="all", window_interval=interval, short="drop")
    dataset = VideoDataset(data, "train", 0)
    step = interval or frames * every
    expected = [(k, [i + n * every for n in range(frames)]) for k, length in enumerate(LENGTHS)
                for i in range(0, length, step) if i + (frames - 1) * every <= length - 1]  # fmt: skip
    assert [shown(dataset[i, 0].video) for i in range(len(dataset))] == expected


def test_buckets(data: Data) -> None:
    """Each clip at the shape that keeps most of it; all that is drawn is a function of the sample."""
    shapes = ((8, 16, 24, 2), (16, 8, 12, 1), (20, 16, 24, 1))
    data = replace(data, buckets=tuple(Bucket(frames=f, height=h, width=w, batch_size=b) for f, h, w, b in shapes))
    dataset = VideoDataset(data, "train", 0)
    assert dataset.groups == [0, 0, 0, 1, 2]
    assert [tuple(dataset[i, 0].video.shape) for i in range(5)] == [
        (8, 16, 24, 3), (8, 16, 24, 3), (8, 16, 24, 3), (16, 8, 12, 3), (20, 16, 24, 3)]  # fmt: skip
    pools = make_pools(dataset.groups, dataset.sets, data, 7)
    batches = list(islice(Plan(pools=pools, seed=0).batches((0, 0, 0)), 12))
    loaded = list(make_loader(dataset, batches))
    assert {tuple(clips.video.shape) for clips in loaded} == {(2, 8, 16, 24, 3), (1, 16, 8, 12, 3), (1, 20, 16, 24, 3)}
    assert dataset.report() == ["train: 3 at 8x16x24, 1 at 16x8x12, 1 at 20x16x24"]


def test_a_flip_mirrors_all_frames_of_a_clip_or_none(data: Data, tmp_path: Path) -> None:
    """cogvideox-factory flips each frame by itself (dataset.py, RandomHorizontalFlip on frames): its clips flicker."""
    sides = np.zeros((8, 16, 24, 3), np.uint8)
    sides[:, :, :12] = 200
    (tmp_path / "sides/train").mkdir(parents=True)
    write_video(tmp_path / "sides/train/a.mp4", sides, 10, lossless=True)
    data = replace(data, root=str(tmp_path / "sides"), flip=0.25)
    dataset = VideoDataset(data, "train", 0)
    flipped = []
    for n in range(200):
        left = dataset[0, n].video[:, :, 0, 0] == 0
        assert left.all() or not left.any()
        flipped.append(bool(left.all()))
    assert 30 < sum(flipped) < 75
    assert [bool((dataset[0, n].video[0, 0, 0] == 0).all()) for n in reversed(range(200))] == flipped[::-1]


def test_random_crops_are_the_same_for_all_frames(data: Data) -> None:
    dataset = VideoDataset(replace(data, height=8, width=16, resize="random_crop"), "train", 0)
    across = np.zeros((8, 16, 48, 3), np.uint8)
    across[..., 0] = np.arange(48) * 5
    write_video(Path(dataset.items[0].clip.path), across, 10, lossless=True)
    dataset = VideoDataset(dataset.data, "train", 0)
    clips = [dataset[0, n].video for n in range(30)]
    assert all((v == v[:1]).all() for v in clips)
    assert len({int(v[0, 0, 0, 0]) for v in clips}) > 3


def test_images_are_clips_of_one_frame(data: Data) -> None:
    for k, color in enumerate([(200, 0, 0), (0, 200, 0)]):
        Image.new("RGB", (24, 16), color).save(Path(data.root) / f"train/still{k}.png")
        (Path(data.root) / f"train/still{k}.txt").write_text("a still")
    shapes = tuple(Bucket(frames=f, height=16, width=24, batch_size=2) for f in (1, 8))
    dataset = VideoDataset(replace(data, buckets=shapes), "train", 0)
    assert dataset.groups == [1, 1, 1, 1, 1, 0, 0]
    assert dataset[5, 0].video.shape == (1, 16, 24, 3) and dataset[5, 0].video[0, 5, 5].tolist() == [200, 0, 0]


def test_the_cache_decodes_once(data: Data) -> None:
    kept, fresh = (VideoDataset(replace(data, cache=c), "train", 0) for c in (True, False))
    kept[3, 0]
    write_video(kept.items[3].clip.path, painted(9, 16), 10, lossless=True)
    assert shown(kept[3, 5].video) == (3, list(range(8))) and kept[3, 5].sample == 5
    assert shown(fresh[3, 5].video)[0] == 9
    with pytest.raises(ValueError, match=r'data\.cache keeps one window .* window="random"'):
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
    """Windows, crops, flips and captions included, and which clip stands in for a broken one."""
    data = replace(data, width=16, window="random", resize="random_crop", flip=0.5)
    dataset = VideoDataset(data, "train", seed=5)
    (Path(data.root) / "train/2.mp4").write_text("no video any more")
    plan = Plan(pools=make_pools(dataset.groups, dataset.sets, data, 3), seed=5)
    batches = list(islice(plan.batches((0,)), 7))
    read = [list(make_loader(dataset, batches, workers)) for workers in (0, 1, 2)]
    assert [b.samples for b in read[0]] == [[n for _, n in batch] for batch in batches]
    assert read[0][0].video.shape == (3, 8, 16, 16, 3)
    assert all(map(equal, read[0], read[1])) and all(map(equal, read[0], read[2]))
    assert sum(len(b.broken) for b in read[1]) >= 4 and [b.broken for b in read[0]] == [b.broken for b in read[2]]


def test_packed_items_are_the_items(data: Data) -> None:
    items = VideoDataset(replace(data, window="all", window_interval=1), "train", 0).items
    packed = PackedItems(items)
    assert len(items) > 2 * BLOCK and list(packed) == list(items)
    assert packed[-1] == items[-1] and packed[15:18] == items[15:18]
    with pytest.raises(IndexError):
        packed[len(items)]


def test_a_resumed_loader_goes_on_as_if_it_had_not_stopped(data: Data) -> None:
    dataset = VideoDataset(replace(data, window="random"), "train", seed=5)
    plan = Plan(pools=make_pools(dataset.groups, dataset.sets, data, 2), seed=5)
    expected = list(islice(make_loader(dataset, plan.batches((0,))), 5))[3:]
    assert all(map(equal, make_loader(dataset, plan.batches((6,))), expected))


def test_another_clip_of_the_same_bucket_stands_in_for_a_broken_one(data: Data) -> None:
    shapes = tuple(Bucket(frames=f, height=16, width=24, batch_size=2) for f in (8, 15))
    dataset = VideoDataset(replace(data, buckets=shapes), "train", 0)
    (Path(data.root) / "train/3.mp4").write_bytes(b"")
    drawn = [dataset.read(3, n) for n in range(20)]
    assert {s.id for s in drawn} == {"train/2", "train/4"} and all(len(s.video) == 15 for s in drawn)
    assert all(s.broken[0].id == "train/3" and "3.mp4" in s.broken[0].reason for s in drawn)
    assert [s.id for s in drawn] == [dataset.read(3, n).id for n in range(20)]
    assert dataset.read(2, 0).broken == ()


def test_broken_clips_are_counted_from_the_start(data: Data) -> None:
    (Path(data.root) / "train/2.mp4").write_text("no video")
    dataset = VideoDataset(data, "train", 0)
    assert [b.id for b in dataset.broken] == ["train/2"] and len(dataset) == 4
    assert "1 clips are broken" in dataset.report()[1] and "2.mp4" in dataset.report()[1]
    with pytest.raises(ValueError, match=r"1 of 5 clips are broken, data\.max_broken=0 may be.*\n.*2\.mp4"):
        VideoDataset(replace(data, max_broken=0), "train", 0)


def test_nothing_but_broken_clips_ends_in_an_error_and_not_in_a_loop(data: Data) -> None:
    """Cosmos-Predict1's dataset_video.py calls itself with another index for ever."""
    dataset = VideoDataset(data, "train", 0)
    for k in range(5):
        (Path(data.root) / f"train/{k}.mp4").write_text("no video")
    for workers in (0, 1):
        # A line for each, and neither a traceback of the worker's nor a hang.
        with pytest.raises(VideoError, match=r"^5 clips in a row can't be read:(\n  .*){5}$"):
            next(make_loader(dataset, [[(0, 0)]], workers))
    with pytest.raises(ValueError, match=r"no usable clip among the 5 of train"):
        VideoDataset(data, "train", 0)


def test_the_loader_leaves_the_global_generator_alone(data: Data) -> None:
    before = torch.get_rng_state()
    dataset = VideoDataset(data, "train", 0)
    next(make_loader(dataset, iterate_once(dataset.groups, 2)))
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
    a, b, c = (Clip(id=n, media=Media(str(tmp_path / f"{n}.mp4")), split="train") for n in "abc")
    assert content_hash(a) == content_hash(b)  # The name does not matter,
    memory = [Clip(id=p, media=Media(f"flying-mnist://{p}"), split="train") for p in
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
        content_hash(replace(a, media=Media("nowhere.mp4")))
