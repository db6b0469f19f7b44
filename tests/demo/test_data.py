import torch

from qs_compiler.demo.data import MAX_OBJECTS, draw_scenes, positions, render


def test_the_seed_decides_everything():
    one, same, other = (render(draw_scenes(4, seed), 4, 32) for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_clips_are_rgb_in_range_at_any_grid():
    scenes = draw_scenes(3, seed=0)
    for frames, side in ((1, 16), (5, 40), (8, 32)):
        clips = render(scenes, frames, side)
        assert clips.shape == (3, 3, frames, side, side)
        assert clips.dtype == torch.float32
        assert clips.min() >= 0 and clips.max() <= 1


def test_held_out_and_training_captions_are_disjoint():
    assert all(c.held_out for c in draw_scenes(300, seed=1, held_out=True).captions())
    assert not any(c.held_out for c in draw_scenes(300, seed=1).captions())


def test_objects_stay_inside_and_only_extras_bounce():
    scenes = draw_scenes(300, seed=2)
    path = positions(scenes, frames=33)
    wall = scenes.radius[:, :, None, None]
    assert (path >= wall - 1e-5).all() and (path <= 1 - wall + 1e-5).all()
    main, extras = path[:, :1].diff(dim=2), path[:, 1:].diff(dim=2)
    assert torch.allclose(main, main[:, :, :1].expand_as(main), atol=1e-5)
    assert (extras[:, :, 1:] * extras[:, :, :-1] < -1e-6).any()


def test_one_to_three_objects_of_distinct_colours_and_some_overlap():
    scenes = draw_scenes(300, seed=4)
    assert scenes.count.unique().tolist() == list(range(1, MAX_OBJECTS + 1))
    assert all(len(set(row)) == MAX_OBJECTS for row in scenes.colour.tolist())
    path = positions(scenes, 16)
    gap = (path[:, 0] - path[:, 1]).norm(dim=-1) - scenes.radius[:, :1] - scenes.radius[:, 1:2]
    assert ((gap < 0).any(1) & (scenes.count > 1)).any()


def test_the_ground_drifts():
    scenes = draw_scenes(8, seed=5)
    scenes.count[:] = 0  # no objects
    clips = render(scenes, 3, 32)
    assert (clips[:, :, 0] - clips[:, :, 1]).abs().mean((1, 2, 3)).min() > 1e-4
