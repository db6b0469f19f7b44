"""The demo's figures as rows of text, for the terminal and for the report alike."""

from __future__ import annotations

from .run import Outcome

Row = tuple[str, ...]

PHASES = {
    "dense": "full attention, no cache",
    "refresh": "full attention; renews block lists and residuals",
    "sparse": "kept blocks only, corrected by the residual",
}


def headline(outcome: Outcome) -> list[Row]:
    """(what, figure, in other words): what one looks at first."""
    before, after = sum(outcome.bytes_before.values()), sum(outcome.bytes_after.values())
    sparse, total = outcome.calls.get("sparse", 0), sum(outcome.calls.values())
    density = outcome.sparse_density
    return [
        ("PSNR", f"{outcome.likeness.psnr:.1f} dB", "against the uncompressed clip of the same noise"),
        ("SSIM", f"{outcome.likeness.ssim:.3f}", "1 is the same clip"),
        (
            "Weights",
            f"{_megabytes(after)} MB",
            f"{before / after:.1f} x smaller than {_megabytes(before)} MB in 16 bit",
        ),
        (
            "Density, sparse step",
            "none" if density is None else f"{density:.0%}",
            "no call ran sparse" if density is None else "of the attention's blocks are read",
        ),
        ("Density, whole run", f"{outcome.average_density:.0%}", f"{sparse} of {total} calls ran sparse"),
        *(("Error of a forward", f"{error:.1%}", f"weights {how}") for how, error in outcome.forward_errors.items()),
    ]


def weight_rows(outcome: Outcome) -> list[Row]:
    """(class, 16-bit MB, compressed MB, ratio), and the sum."""
    classes = [name for name, size in outcome.bytes_before.items() if size or outcome.bytes_after[name]]
    pairs = [(name, outcome.bytes_before[name], outcome.bytes_after[name]) for name in classes]
    pairs.append(("all", sum(outcome.bytes_before.values()), sum(outcome.bytes_after.values())))
    return [(name, _megabytes(a), _megabytes(b), f"{a / b:.1f} x" if b else "") for name, a, b in pairs]


def phase_rows(outcome: Outcome) -> list[Row]:
    """(phase, calls of the model, seconds of compiling, what it does)."""
    seconds = {
        phase: [r.compile_seconds[phase] for r in outcome.reports if phase in r.compile_seconds] for phase in PHASES
    }
    return [
        (
            phase,
            str(outcome.calls.get(phase, 0)),
            f"{sum(seconds[phase]):.1f}" if seconds[phase] else "not compiled",
            meaning,
        )
        for phase, meaning in PHASES.items()
    ]


def pass_rows(outcome: Outcome) -> list[Row]:
    """(pass, matches in the dense, refresh and sparse graph): what was rewritten."""
    found: dict[str, dict[str, int]] = {}
    for report in outcome.reports:
        for one in report.passes:
            matches = found.setdefault(one.name, {})
            matches[one.phase] = matches.get(one.phase, 0) + one.matched
    return [(name, *(str(matches.get(p, "")) for p in PHASES)) for name, matches in found.items()]


def skip_rows(outcome: Outcome) -> list[Row]:
    """(pass, nodes, reason, which): what was left alone and why."""
    return [(name, str(len(nodes)), reason, ", ".join(nodes)) for name, reason, nodes in outcome.skipped]


def fallback_rows(outcome: Outcome) -> list[Row]:
    """(op, reason) of what ran as its reference."""
    return list(dict.fromkeys((op, reason) for report in outcome.reports for op, reason in report.fallbacks))


def setting_rows(outcome: Outcome, command: str) -> list[Row]:
    """(what, value): all that is needed to do it again, and how long it took."""
    demo = outcome.demo
    grid = f"{demo.setting.frames} frames of {demo.setting.side} x {demo.setting.side}"
    return [
        ("command", command),
        ("recipe", f"{demo.recipe}: {_recipe_words(outcome)}"),
        ("clip", f"{grid} pixels, {demo.setting.tokens:,} tokens; {demo.setting.num_steps} steps, seed {demo.seed}"),
        ("guidance", f"{demo.setting.guidance:g}"),
        ("device", outcome.device),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in outcome.seconds.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in outcome.versions.items())),
        ("date", outcome.date),
    ]


def _recipe_words(outcome: Outcome) -> str:
    recipe = outcome.demo.recipe
    weights = "calibrated" if outcome.calibrated else "rounded without data"
    words = [] if recipe.weight_format is None else [f"weights {recipe.weight_format}, {weights}"]
    if recipe.activation_format != "none":
        words.append(f"activations {recipe.activation_format}")
    if recipe.density < 1:
        words.append(
            f"blocks of {recipe.block_size}, {recipe.correction.replace('_', '-')} correction, "
            f"refresh every {recipe.interval} steps, {recipe.warmup:.0%} warm-up"
        )
    return "; ".join(words) or "nothing compressed"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"
