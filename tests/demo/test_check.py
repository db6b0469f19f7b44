import pytest
import torch

from qs_compiler.demo.captions import COLOURS
from qs_compiler.demo.check import accuracy, read_clips
from qs_compiler.demo.data import draw_scenes, render


@pytest.mark.parametrize(("frames", "side"), [(8, 32), (16, 64)])
def test_real_clips_read_as_their_captions(frames, side):
    scenes = draw_scenes(64, seed=11)
    found = accuracy(render(scenes, frames, side), scenes.captions())
    assert found.colour >= 0.98 and found.direction >= 0.98  # an extra may hide the main object


def test_a_clip_played_backwards_reads_the_opposite_way():
    scenes = draw_scenes(32, seed=12)
    clips, opposite = render(scenes, 8, 32), {"left": "right", "right": "left", "up": "down", "down": "up"}
    for forth, back in zip(read_clips(clips), read_clips(clips.flip(2)), strict=True):
        assert back.colour == forth.colour
        assert back.direction == opposite[forth.direction]


def test_a_still_clip_has_a_colour_and_no_direction():
    scenes = draw_scenes(16, seed=13)
    still = render(scenes, 8, 32)[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert {r.direction for r in read_clips(still)} == {None}
    assert {r.colour for r in read_clips(still)} <= set(COLOURS)


def test_grounds_and_noise_alone_show_nothing():
    scenes = draw_scenes(64, seed=14)
    scenes.count[:] = 0
    assert {r.colour for r in read_clips(render(scenes, 4, 32))} == {None}
    noise = 0.5 + 0.05 * torch.randn(2, 3, 4, 32, 32)
    assert {r.colour for r in read_clips(noise.clamp(0, 1))} == {None}


def test_shuffled_captions_score_near_chance():
    scenes = draw_scenes(256, seed=15)
    captions = scenes.captions()
    found = accuracy(render(scenes, 8, 32), captions[1:] + captions[:1])
    assert found.colour < 0.3 and found.direction < 0.4
