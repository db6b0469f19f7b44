"""Recipes and backend options: what is accepted, how it resolves, and the text of every error."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from qs_compiler.artifact import Artifact
from qs_compiler.errors import ArtifactError, OptionError, QuantSparseError, RecipeError
from qs_compiler.options import FORMATS, BackendOptions, Recipe


def artifact(recipe: str = "w4a8-d25", **fields: Any) -> Artifact:
    return Artifact(recipe=replace(Recipe.parse(recipe), **fields), model_class="Model", config_hash="0" * 64)


# --- recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("percent", [None, 1, 15, 33, 99])
def test_name_round_trip(name: str, percent: int | None) -> None:
    text = name if percent is None else f"{name}-d{percent}"
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert recipe.format == name
    assert recipe.density == (1.0 if percent is None else percent / 100)


def test_every_percent_survives_the_round_trip() -> None:
    names = [f"w4a8-d{p}" for p in range(1, 100)]
    assert [str(Recipe.parse(name)) for name in names] == names


def test_full_density_is_dense() -> None:
    assert str(Recipe.parse("w8a8-d100")) == "w8a8"
    assert Recipe.parse("w8a8-d100") == Recipe.parse("w8a8")


def test_a_density_between_percents_shows_in_the_name() -> None:
    assert str(Recipe(density=0.125)) == "w8a8-d12.5"


def test_formats() -> None:
    assert (Recipe(format="w4a8").weight_format, Recipe(format="w4a8").activation_format) == ("int4", "int8")
    assert (Recipe(format="off").weight_format, Recipe(format="off").activation_format) == (None, "none")


def test_weight_only_keeps_the_storage_and_drops_the_activation() -> None:
    assert {name: Recipe(format=name).weight_only().format for name in FORMATS} == {
        "off": "off",
        "w8a8": "w8a16",
        "w4a8": "w4a16",
        "fp8": "w8a16",
        "w4fp8": "w4a16",
        "w8a16": "w8a16",
        "w4a16": "w4a16",
        "w6a6": "w8a16",
        "w4a4": "w4a16",
    }


def test_parse_of_a_dict_sets_only_its_keys() -> None:
    base = Recipe(format="w4a8", density=0.25, rank=4)
    assert Recipe.parse({"density": 0.15}, base) == Recipe(format="w4a8", density=0.15, rank=4)
    assert Recipe.parse({}, base) == base
    assert Recipe.parse("fp8-d40", base) == Recipe(format="fp8", density=0.4, rank=4)
    assert Recipe.parse("fp8", base).density == 1.0
    assert Recipe.parse(Recipe(), base) == Recipe()


def test_dict_round_trip_through_json() -> None:
    recipe = Recipe(
        "w4a8", 0.25, keep=("*.proj_out",), overrides={"blocks.0.*": {"format": "w8a8"}, "blocks.1.*": {"density": 1}}
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_recipes_are_values() -> None:
    one = Recipe(keep=["a"], overrides={"b": {"density": 0.5}}, density=1)  # type: ignore[arg-type]
    two = Recipe(keep=("a",), overrides={"b": {"density": 0.5}})
    assert one == two
    assert hash(one) == hash(two)
    assert {one: 1}[two] == 1
    assert isinstance(one.density, float)
    assert copy.deepcopy(one) == one
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(FrozenInstanceError):
        one.density = 0.5  # type: ignore[misc]


def test_a_recipe_does_not_follow_later_changes_of_its_overrides() -> None:
    overrides = {"a": {"format": "w8a8"}}
    recipe = Recipe("w4a8", overrides=overrides)
    overrides["a"]["format"] = "fp8"
    assert recipe.for_layer("a").format == "w8a8"


def test_for_layer() -> None:
    recipe = Recipe(
        "w4a8",
        0.25,
        keep=("*.proj_out",),
        overrides={"blocks.*": {"format": "w8a8"}, "blocks.1.*": {"format": "fp8", "density": 0.5}},
    )
    assert str(recipe.for_layer("other")) == "w4a8-d25"
    assert str(recipe.for_layer("blocks.0.to_q")) == "w8a8-d25"
    assert str(recipe.for_layer("blocks.1.to_q")) == "fp8-d50"
    assert str(recipe.for_layer("blocks.1.proj_out")) == "off-d50"
    assert recipe.for_layer("blocks.0.to_q") == recipe.for_layer("blocks.7.to_k"), "one compiled variant for both"
    assert str(recipe.for_layer("BLOCKS.1.to_q")) == "w4a8-d25", "names are case-sensitive on every system"


FORMAT_LIST = "off, w8a8, w4a8, fp8, w4fp8, w8a16, w4a16, w6a6, w4a4"
DENSITY_SUFFIX = "write -dNN with an integer from 1 to 100, such as w8a8-d25, or give the fraction in a dict"

WRONG_RECIPES: list[tuple[Any, str]] = [
    ("w8a9", f"recipe 'w8a9' is not known; did you mean 'w8a8'? Formats: {FORMAT_LIST}; each takes a density"),
    ("W8A8", "recipe 'W8A8' is not known; did you mean 'w8a8'?"),
    ("w4a9-d25", "recipe 'w4a9-d25' is not known; did you mean 'w4a8'?"),
    ("", f"recipe '' is not known. Formats: {FORMAT_LIST}"),
    ("-d25", "recipe '-d25' is not known. Formats"),
    ("zzz", f"recipe 'zzz' is not known. Formats: {FORMAT_LIST}"),
    (" w8a8", "recipe ' w8a8' is not known; did you mean 'w8a8'?"),
    ("w8a8-d0", f"recipe 'w8a8-d0': '-d0' is no density; {DENSITY_SUFFIX}: {{'format': 'w8a8', 'density': 0.125}}."),
    ("w8a8-d101", f"recipe 'w8a8-d101': '-d101' is no density; {DENSITY_SUFFIX}"),
    ("w8a8-d150", f"recipe 'w8a8-d150': '-d150' is no density; {DENSITY_SUFFIX}"),
    ("w8a8-d" + "9" * 5000, "is no density"),
    ("w8a8-25", f"recipe 'w8a8-25': '-25' is no density; {DENSITY_SUFFIX}"),
    ("w8a8-d", "recipe 'w8a8-d': '-d' is no density"),
    ("w8a8-", "recipe 'w8a8-': '-' is no density"),
    ("w8a8-d12.5", "recipe 'w8a8-d12.5': '-d12.5' is no density"),
    ("w8a8-d-5", "recipe 'w8a8-d-5': '-d-5' is no density"),
    ("w8a8-d\u0662\u0665", "is no density"),  # digits, but not ASCII ones
    ("w8a8-d25\n", "is no density"),
    (8, "a recipe is a name, a dict or a Recipe, not int; write 'w8a8-d25'."),
    (["w8a8"], "a recipe is a name, a dict or a Recipe, not list"),
    (None, "a recipe is a name, a dict or a Recipe, not NoneType"),
    ({"formt": "w8a8"}, "'formt' is not a field of a recipe; did you mean 'format'? Choose from: always_keep,"),
    ({1: "w8a8"}, "'1' is not a field of a recipe. Choose from: always_keep, attention"),
    (
        {"attention": "fp4"},
        "attention 'fp4' is not known; did you mean 'fp8'? Choose from: 16bit, int8, int8-fp8, fp8.",
    ),
    ({"format": "w8a8-d25"}, f"format 'w8a8-d25' is not known; did you mean 'w8a8'? Choose from: {FORMAT_LIST}."),
    ({"format": None}, "format None is not known. Choose from"),
    ({"format": ["w8a8"]}, "format ['w8a8'] is not known. Choose from"),
    *(
        ({"density": value}, f"density must be a number above 0 and at most 1, the kept fraction (0.25 for 25 %), {no}")
        for value, no in [
            (0, "not 0."),
            (-0.5, "not -0.5."),
            (25, "not 25."),
            (1.0001, "not 1.0001."),
            ("0.25", "not '0.25'."),
            (True, "not True."),
            (None, "not None."),
            (math.nan, "not nan."),
            (math.inf, "not inf."),
        ]
    ),
    ({"block_size": 32}, "block_size 32 is not known. Choose from: 64, 128."),
    ({"block_size": 128.0}, "block_size 128.0 is not known. Choose from: 64, 128."),
    ({"block_size": "128"}, "block_size '128' is not known. Choose from: 64, 128."),
    ({"mask": "pool"}, "mask 'pool' is not known; did you mean 'pooled'? Choose from: pooled, mass, "),
    ({"budgets": "fited"}, "budgets 'fited' is not known; did you mean 'fitted'? Choose from: uniform, fitted."),
    ({"correction": "second-order"}, "'second-order' is not known; did you mean 'second_order'? Choose from: none, "),
    ({"correction": None}, "None is not known. Choose from: none, first_order, second_order, complement, mixture."),
    ({"gain": 1}, "gain 1 is not known. Choose from: 0, 1, k/tau, clipped."),
    ({"refresh_steps": [3, 2]}, "refresh_steps must be ascending numbers of steps, not [3, 2]; write refresh_steps="),
    ({"refresh_steps": 5}, "refresh_steps must be ascending numbers of steps, not 5; write refresh_steps=[2, 7, 12]."),
    ({"gain": "k"}, "gain 'k' is not known. Choose from: 0, 1, k/tau, clipped."),
    ({"rank": 0}, "rank must be an integer from 1 to 128, not 0."),
    ({"rank": 129}, "rank must be an integer from 1 to 128, not 129."),
    ({"rank": 16.0}, "rank must be an integer from 1 to 128, not 16.0."),
    ({"rank": True}, "rank must be an integer from 1 to 128, not True."),
    ({"cache_format": "bf8"}, "cache_format 'bf8' is not known; did you mean 'fp8'? Choose from: bf16, fp8, int8, "),
    ({"interval": 0}, "interval must be an integer of at least 1, not 0."),
    ({"interval": -5}, "interval must be an integer of at least 1, not -5."),
    ({"interval": 2.5}, "interval must be an integer of at least 1, not 2.5."),
    ({"interval": "5"}, "interval must be an integer of at least 1, not '5'."),
    ({"warmup": -0.1}, "warmup must be a number from 0 to 1, a fraction of the steps, not -0.1."),
    ({"warmup": 5}, "warmup must be a number from 0 to 1, a fraction of the steps, not 5."),
    ({"warmup": "0.1"}, "warmup must be a number from 0 to 1, a fraction of the steps, not '0.1'."),
    ({"group_size": 100}, "group_size 100 is not known. Choose from: 32, 64, 128, 256."),
    ({"keep": "*.to_q"}, "keep must be a sequence of name patterns, not '*.to_q'; write keep=['*.to_q']."),
    ({"keep": 5}, "keep must be a sequence of name patterns, not 5"),
    ({"keep": [5]}, "keep holds 5; a name pattern is a non-empty string such as '*.to_q'."),
    ({"keep": [""]}, "keep holds ''; a name pattern is a non-empty string"),
    ({"overrides": ["*.to_q"]}, "overrides must map name patterns to fields, not ['*.to_q']."),
    ({"overrides": {"*.to_q": "w8a8"}}, "overrides['*.to_q'] must be a dict like {'format': 'w8a8'}, not 'w8a8'."),
    (
        {"overrides": {"*.to_q": {"fromat": "w8a8"}}},
        "'fromat' is not a field of overrides['*.to_q']; did you mean 'format'? Choose from: density, format.",
    ),
    ({"overrides": {"*.to_q": {"rank": 8}}}, "'rank' is not a field of overrides['*.to_q']"),
    ({"overrides": {"*.to_q": {"format": "w8a9"}}}, "format 'w8a9' is not known; did you mean 'w8a8'?"),
    ({"overrides": {"*.to_q": {"density": 0}}}, "density must be a number above 0 and at most 1"),
    ({"overrides": {1: {"density": 0.5}}}, "overrides holds 1; a name pattern is a non-empty string"),
]


@pytest.mark.parametrize(("value", "text"), WRONG_RECIPES, ids=lambda v: repr(v)[:40])
def test_wrong_recipe(value: Any, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(value)
    assert text in str(caught.value)
    assert isinstance(caught.value, OptionError | QuantSparseError | ValueError)


# --- options of the backend --------------------------------------------------------------------------------------


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QS_DEBUG_DIR", raising=False)
    for nothing in (BackendOptions.parse(), BackendOptions.parse({}), BackendOptions.parse({"recipe": None})):
        assert nothing == BackendOptions()
        assert str(nothing.recipe) == "w8a8"
        assert (nothing.interval, nothing.warmup, nothing.strict, nothing.mode) == (5, 0.1, False, None)
        assert (nothing.artifact, nothing.memory_budget, nothing.debug_dir) == (None, None, None)


def test_all_options() -> None:
    options = BackendOptions.parse(
        {
            "recipe": "w8a8-d25",
            "interval": 4,
            "warmup": 0.2,
            "memory_budget": 10**9,
            "strict": True,
            "debug_dir": "dumps",
            "mode": "max-autotune",
        }
    )
    assert str(options.recipe) == "w8a8-d25"
    assert (options.interval, options.warmup) == (options.recipe.interval, options.recipe.warmup) == (4, 0.2)
    assert (options.memory_budget, options.strict, options.debug_dir) == (10**9, True, Path("dumps"))
    assert options.mode == "max-autotune"


def test_interval_option_beats_the_recipe() -> None:
    assert BackendOptions.parse({"recipe": {"interval": 7}, "interval": 3}).interval == 3
    assert BackendOptions.parse({"recipe": {"interval": 7}}).interval == 7


def test_mode_from_either_place() -> None:
    assert BackendOptions.parse(mode="reduce-overhead").mode == "reduce-overhead"
    assert BackendOptions.parse({"mode": "reduce-overhead"}).mode == "reduce-overhead"
    assert BackendOptions.parse({"mode": "reduce-overhead"}, "reduce-overhead").mode == "reduce-overhead"
    assert BackendOptions.parse(mode="default").mode is None


def test_debug_dir_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QS_DEBUG_DIR", "from_env")
    assert BackendOptions.parse().debug_dir == Path("from_env")
    assert BackendOptions.parse({"debug_dir": Path("mine")}).debug_dir == Path("mine")
    monkeypatch.setenv("QS_DEBUG_DIR", "")
    assert BackendOptions.parse().debug_dir is None


def test_artifact_beats_the_default_and_an_option_beats_the_artifact() -> None:
    fitted = artifact("w4a8-d25", interval=8, warmup=0.3, rank=4)
    assert BackendOptions.parse({"artifact": fitted}).recipe == fitted.recipe
    assert BackendOptions.parse(artifact=fitted).recipe == fitted.recipe, "the artifact of an attached model"
    options = BackendOptions.parse({"artifact": fitted, "recipe": "w4a8-d15", "warmup": 0.0})
    assert options.recipe == replace(fitted.recipe, density=0.15, warmup=0.0)
    assert options.interval == 8, "a name sets format and density only"
    other = artifact("fp8")
    assert BackendOptions.parse({"artifact": fitted}, artifact=other).artifact is fitted


def test_artifact_from_a_path(tmp_path: Path) -> None:
    artifact("w4a8-d25", interval=8).save(tmp_path / "a.qs")
    for path in (tmp_path / "a.qs", str(tmp_path / "a.qs")):
        options = BackendOptions.parse({"artifact": path})
        assert options.artifact is not None
        assert str(options.recipe) == "w4a8-d25"


def test_off_runs_on_an_artifact() -> None:
    assert str(BackendOptions.parse({"artifact": artifact(), "recipe": "off"}).recipe) == "off"


@pytest.mark.parametrize(
    ("fitted", "options"),
    [
        (artifact("w4a8-d25"), {"recipe": "w4a8", "interval": 3}),  # run dense: no correction at work
        (artifact("w4a8"), {"interval": 3}),  # nothing was fitted
        (artifact("w4a8-d25", correction="none"), {"interval": 3}),
        (artifact("w4a8-d25"), {"recipe": {"correction": "none"}, "interval": 3}),
    ],
)
def test_interval_is_free_where_no_fitted_correction_is_at_work(fitted: Artifact, options: dict[str, Any]) -> None:
    assert BackendOptions.parse({"artifact": fitted, **options}).interval == 3


OPTION_LIST = "artifact, debug_dir, grid, interval, memory_budget, mode, recipe, strict, warmup"

WRONG_OPTIONS: list[tuple[Any, type[QuantSparseError], str]] = [
    (
        {"intervall": 5},
        OptionError,
        f"'intervall' is not an option of backend 'quantsparse'; did you mean 'interval'? Choose from: {OPTION_LIST}.",
    ),
    ({"density": 0.25}, OptionError, "'density' is not an option of backend 'quantsparse'."),
    ({3: 5}, OptionError, "'3' is not an option of backend 'quantsparse'. Choose from"),
    ({"max_autotune": True}, OptionError, "'max_autotune' is not an option of backend 'quantsparse'"),
    (["w8a8"], OptionError, "options must be a dict, not list."),
    ("w8a8", OptionError, "options must be a dict, not str."),
    ({"recipe": "w8a8-d150"}, RecipeError, "'-d150' is no density"),
    ({"recipe": {"density": 0}}, RecipeError, "density must be a number above 0"),
    ({"interval": 0}, RecipeError, "interval must be an integer of at least 1, not 0."),
    ({"interval": "5"}, RecipeError, "interval must be an integer of at least 1, not '5'."),
    ({"warmup": 1.5}, RecipeError, "warmup must be a number from 0 to 1, a fraction of the steps, not 1.5."),
    ({"memory_budget": -1}, OptionError, "memory_budget must be an integer of at least 0, not -1."),
    ({"memory_budget": "8GB"}, OptionError, "memory_budget must be an integer of at least 0, not '8GB'."),
    ({"memory_budget": True}, OptionError, "memory_budget must be an integer of at least 0, not True."),
    ({"strict": "yes"}, OptionError, "strict must be True or False, not 'yes'."),
    ({"strict": 1}, OptionError, "strict must be True or False, not 1."),
    ({"debug_dir": 5}, OptionError, "debug_dir must be a path, not 5."),
    ({"mode": "max_autotune"}, OptionError, "mode 'max_autotune' is not known; did you mean 'max-autotune'?"),
    ({"mode": 3}, OptionError, "mode 3 is not known. Choose from: default, reduce-overhead"),
    ({"grid": (4, 8)}, OptionError, "grid must be three positive integers, tokens in time, height and width, not (4"),
    ({"recipe": {"mask": "radiall"}}, RecipeError, "mask 'radiall' is not known; did you mean 'radial'?"),
    ({"recipe": {"always_keep": "text"}}, RecipeError, "always_keep must be a sequence of text, first_frame"),
    ({"recipe": {"always_keep": ["texts"]}}, RecipeError, "always_keep 'texts' is not known; did you mean 'text'?"),
    ({"artifact": 5}, OptionError, "artifact must be a path or an Artifact, not int."),
    ({"artifact": "nowhere.qs"}, ArtifactError, "nowhere.qs"),
    (
        {"artifact": artifact("w4a8-d25"), "recipe": "w8a8"},
        OptionError,
        "recipe 'w8a8' asks for w8a8, but the artifact is packed as w4a8; use a recipe of w4a8, or calibrate an "
        "artifact for w8a8.",
    ),
    (
        {"artifact": artifact("w4a8-d25", interval=8), "interval": 5},
        OptionError,
        "interval 5 is not the 8 that the artifact's correction was fitted for; use interval=8, or calibrate with "
        "interval=5.",
    ),
    (
        {"artifact": artifact("w4a8-d25", interval=8), "recipe": Recipe("w4a8", 0.15)},
        OptionError,
        "interval 5 is not the 8",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG_OPTIONS, ids=lambda v: repr(v)[:40])
def test_wrong_options(options: Any, error: type[QuantSparseError], text: str) -> None:
    with pytest.raises(error) as caught:
        BackendOptions.parse(options)
    assert text in str(caught.value)


def test_modes_in_conflict() -> None:
    with pytest.raises(OptionError, match=r"mode is 'max-autotune' as an argument and 'default' in options; give"):
        BackendOptions.parse({"mode": "default"}, "max-autotune")


def test_fingerprint() -> None:
    base = BackendOptions.parse({"recipe": {"overrides": {"a": {"density": 0.5}}}})
    same = BackendOptions.parse({"recipe": {"overrides": {"a": {"density": 0.5}}}, "debug_dir": "dumps"})
    assert base.fingerprint() == same.fingerprint(), "where dumps go does not change the code"
    assert json.loads(base.fingerprint())["recipe"]["overrides"] == {"a": {"density": 0.5}}
    others = [
        {"recipe": "w8a8"},
        {"recipe": "w8a8-d25"},
        {"interval": 4},
        {"warmup": 0.2},
        {"memory_budget": 1},
        {"strict": True},
        {"mode": "max-autotune"},
        {"artifact": artifact("w8a8")},
        {"artifact": artifact("w8a8", rank=4)},
    ]
    prints = [base.fingerprint(), *(BackendOptions.parse(o).fingerprint() for o in others)]
    assert len(set(prints)) == len(prints)
