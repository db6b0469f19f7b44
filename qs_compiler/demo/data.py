"""Procedural clips with captions: a textured object crosses a drifting ground, others bounce off the walls.

What a clip shows is drawn on the CPU from a seed (a few numbers a clip), so it is the same on every device; the pixels
are computed on the device that they are wanted on. Lengths are fractions of the frame's side and speeds fractions a
clip, so one scene renders at any grid; textures and the ground's drift are in pixels, so they look alike on all.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .captions import COLOURS, DIRECTIONS, GROUNDS, MAX_EXTRAS, PATTERNS, SHAPES, SIZES, Caption, is_held_out

MAX_OBJECTS = 1 + MAX_EXTRAS
EXTRA_RADIUS = (0.075, 0.10)
TRAVEL = (0.40, 0.55)  # of the main object; together with the largest radius it still fits between the walls

_TRIPLES = [
    (c, s, d) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for d in range(len(DIRECTIONS))
]  # colour, shape and direction of the main object
_SEEN = torch.tensor([t for t in _TRIPLES if not is_held_out(*t)])
_HELD_OUT = torch.tensor([t for t in _TRIPLES if is_held_out(*t)])


@dataclasses.dataclass
class Scenes:
    """B scenes of up to MAX_OBJECTS objects (n); object 0 is the main one. All tensors live on the CPU.

    Index tensors (int64) point into the word lists of captions.py; the rest is fp32.
    """

    colour: torch.Tensor  # (B, n)
    shape: torch.Tensor  # (B, n)
    size: torch.Tensor  # (B,)
    direction: torch.Tensor  # (B,)
    count: torch.Tensor  # (B,) objects in the scene, 1 to n
    ground: torch.Tensor  # (B,)
    pattern: torch.Tensor  # (B,)
    radius: torch.Tensor  # (B, n) of the side
    start: torch.Tensor  # (B, n, 2) x, y of the side
    velocity: torch.Tensor  # (B, n, 2) sides a clip
    texture: torch.Tensor  # (B, n, 3) angle, phase, wavelength in pixels
    relief: torch.Tensor  # (B, 3) the ground's phases x, y and its wavelength in pixels
    drift: torch.Tensor  # (B, 2) of the ground, pixels a frame
    order: torch.Tensor  # (B, n) from the back to the front

    def __len__(self) -> int:
        return len(self.count)

    def captions(self) -> list[Caption]:
        """The B captions."""
        sizes, colours, directions, grounds = (tuple(words) for words in (SIZES, COLOURS, DIRECTIONS, GROUNDS))
        fields = (self.size, self.colour, self.shape, self.direction, self.ground, self.pattern, self.count)
        rows = zip(*(field.tolist() for field in fields), strict=True)
        return [
            Caption(
                sizes[size],
                colours[colour[0]],
                SHAPES[shape[0]],
                directions[direction],
                grounds[ground],
                PATTERNS[pattern],
                tuple((colours[colour[i]], SHAPES[shape[i]]) for i in range(1, count)),
            )
            for size, colour, shape, direction, ground, pattern, count in rows
        ]


def draw_scenes(batch: int, seed: int, *, held_out: bool = False) -> Scenes:
    """Draw `batch` scenes, all of training captions or, with `held_out`, none of them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float | torch.Tensor, high: float | torch.Tensor, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    def choice(count: int, *shape: int) -> torch.Tensor:
        return torch.randint(count, (batch, *shape), generator=generator)

    n = MAX_OBJECTS
    triples = _HELD_OUT if held_out else _SEEN
    main_colour, main_shape, direction = triples[choice(len(triples))].unbind(1)

    # No two objects share a colour: the extras take the main colour plus distinct non-zero offsets.
    offsets = 1 + torch.rand(batch, len(COLOURS) - 1, generator=generator).argsort(1)[:, :MAX_EXTRAS]
    colour = torch.cat([main_colour[:, None], (main_colour[:, None] + offsets) % len(COLOURS)], 1)
    shape = torch.cat([main_shape[:, None], choice(len(SHAPES), MAX_EXTRAS)], 1)

    size = choice(len(SIZES))
    low, high = torch.tensor(list(SIZES.values()))[size].unbind(1)
    radius = torch.cat([uniform(low, high)[:, None], uniform(*EXTRA_RADIUS, MAX_EXTRAS)], 1)

    # The main object goes straight and never meets a wall: its start leaves it room along its way.
    toward = torch.tensor(list(DIRECTIONS.values()))[direction]
    travel = uniform(*TRAVEL)[:, None]
    room = radius[:, :1] + (1 - 2 * radius[:, :1] - travel * toward.abs()) * uniform(0, 1, 2)
    main_start = room + travel * (-toward).clamp(min=0)
    extra_start = 0.15 + 0.7 * uniform(0, 1, MAX_EXTRAS, 2)
    angle, speed = uniform(0, 2 * math.pi, MAX_EXTRAS), uniform(0.25, 0.8, MAX_EXTRAS)
    extra_velocity = torch.stack([angle.cos(), angle.sin()], -1) * speed[..., None]

    turn, phase, wavelength = uniform(0, math.pi, n), uniform(0, 2 * math.pi, n), uniform(5.0, 8.0, n)
    drift_angle, drift_speed = uniform(0, 2 * math.pi), uniform(0.2, 0.6)
    return Scenes(
        colour=colour,
        shape=shape,
        size=size,
        direction=direction,
        count=torch.tensor([1, 1, 2, 2, 3])[choice(5)],
        ground=choice(len(GROUNDS)),
        pattern=choice(len(PATTERNS)),
        radius=radius,
        start=torch.cat([main_start[:, None], extra_start], 1),
        velocity=torch.cat([(toward * travel)[:, None], extra_velocity], 1),
        texture=torch.stack([turn, phase, wavelength], -1),
        relief=torch.cat([uniform(0, 2 * math.pi, 2), uniform(10.0, 16.0, 1)], 1),
        drift=torch.stack([drift_angle.cos(), drift_angle.sin()], -1) * drift_speed[:, None],
        order=torch.rand(batch, n, generator=generator).argsort(1),
    )


def positions(scenes: Scenes, frames: int) -> torch.Tensor:
    """Centres of all objects, (B, n, frames, 2) fp32 as fractions of the side; objects bounce off the walls."""
    time = torch.linspace(0, 1, frames)[:, None]
    free = scenes.start[:, :, None] + scenes.velocity[:, :, None] * time
    wall = scenes.radius[:, :, None, None]
    span = 1 - 2 * wall
    folded = (free - wall).remainder(2 * span)
    return wall + span - (folded - span).abs()


def render(scenes: Scenes, frames: int, side: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The clips, (B, 3, frames, side, side) fp32 in [0, 1] on `device`."""
    # Copies that do not block: training must not wait for the device once a batch.
    s = {f.name: getattr(scenes, f.name).to(device, non_blocking=True) for f in dataclasses.fields(scenes)}
    centres = (positions(scenes, frames) * side).to(device, non_blocking=True)
    x = (torch.arange(side, device=device) + 0.5)[None, None, None, :]
    y = x.transpose(2, 3)
    clips = _ground(s, frames, x, y)
    palette = torch.tensor(list(COLOURS.values())).to(device, non_blocking=True)
    row = torch.arange(len(scenes), device=device)
    for layer in range(MAX_OBJECTS):
        i = s["order"][:, layer]
        dx, dy = (a - c[:, :, None, None] for a, c in zip((x, y), centres[row, i].unbind(-1), strict=True))
        edge = _distance(dx, dy, s["radius"][row, i] * side, s["shape"][row, i])
        alpha = (0.5 - edge).clamp(0, 1) * (i < s["count"])[:, None, None, None]
        turn, phase, wavelength = (t[:, None, None, None] for t in s["texture"][row, i].unbind(-1))
        stripes = torch.sin((dx * turn.cos() + dy * turn.sin()) * (2 * math.pi / wavelength) + phase)
        paint = palette[s["colour"][row, i]][:, :, None, None, None] * (0.86 + 0.14 * stripes)[:, None]
        clips = torch.lerp(clips, paint, alpha[:, None])
    return clips


def _distance(dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline in pixels, negative inside; dx, dy (B, frames, side, side) from the centre."""
    r, shape = radius[:, None, None, None], shape[:, None, None, None]
    ax, ay = dx.abs(), dy.abs()
    across, along = torch.maximum(ax, ay), torch.minimum(ax, ay)
    square = across - 0.88 * r
    triangle = torch.maximum(dy, 0.866 * ax - 0.5 * dy) - 0.65 * r
    cross = torch.maximum(across - r, along - 0.38 * r)
    by_shape = {"square": square, "triangle": triangle, "cross": cross}
    distance = torch.hypot(dx, dy) - r  # circle
    for name, other in by_shape.items():
        distance = torch.where(shape == SHAPES.index(name), other, distance)
    return distance


def _ground(s: dict[str, torch.Tensor], frames: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The drifting ground, (B, 3, frames, side, side)."""
    time = torch.arange(frames, device=x.device)
    moved = s["drift"][:, :, None] * time  # (B, 2, frames)
    phase_x, phase_y, wavelength = s["relief"].unbind(1)
    scale = (2 * math.pi / wavelength)[:, None, None, None]
    u = (x - moved[:, 0, :, None, None]) * scale + phase_x[:, None, None, None]
    v = (y - moved[:, 1, :, None, None]) * scale + phase_y[:, None, None, None]
    pattern = s["pattern"][:, None, None, None]
    relief = torch.sin(v + 0.9 * torch.sin(u))  # waves
    others = {
        "stripes": torch.tanh(3 * torch.sin(u + v)),
        "checks": torch.tanh(4 * torch.sin(u) * torch.sin(v)),
        "dots": 2 * torch.sigmoid(6 * (torch.cos(u) * torch.cos(v) - 0.5)) - 1,
    }
    for name, other in others.items():
        relief = torch.where(pattern == PATTERNS.index(name), other, relief)
    colour = torch.tensor(list(GROUNDS.values())).to(x.device, non_blocking=True)[s["ground"]][:, :, None, None, None]
    return colour * (1 + 0.35 * relief)[:, None]
