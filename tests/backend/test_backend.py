"""The backend as a caller meets it: registration, options, errors, memory, and models with little to rewrite."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db

import qs_compiler as qs
from qs_compiler import _compat
from qs_compiler.errors import ArtifactError, DeviceError, OptionError, RecipeError, UnsupportedError
from tests.backend.models import RECIPE, ExoticDiT, TinyDiT, clip, make
from tests.tolerances import relative_error

X = torch.randn(1, 64, 32)
NO_SIGNAL = "ignore:recipe .* runs dense while nothing says:UserWarning"


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="quantsparse", options=options)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_registers_the_backend_once() -> None:
    out = run_python(
        """
        import sys
        import qs_compiler, torch
        print(torch._dynamo.list_backends().count("quantsparse"), "torch._inductor.lowering" in sys.modules)
        """
    )
    assert out.split() == ["1", "False"]


@pytest.mark.parametrize("name", ["nn.functional.linear", "nn.functional.scaled_dot_product_attention",
                                  "nn.functional.layer_norm", "nn.functional.gelu"])  # fmt: skip
def test_off_gives_eagers_values_on_opinfo_samples(name: str) -> None:
    (info,) = [o for o in op_db if o.name == name]
    samples = list(info.sample_inputs("cpu", torch.float32))
    samples = [s for s in samples if not s.kwargs.get("dropout_p")][:12]

    function = getattr(torch.nn.functional, name.rpartition(".")[2])

    def every() -> list[torch.Tensor]:
        return [function(s.input, *s.args, **s.kwargs) for s in samples]

    got = torch.compile(every, backend="quantsparse", options={"recipe": "off"})()
    for a, b in zip(got, every(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("eager_graphs")
class TestLittleToRewrite:
    def test_nothing_at_all(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        x = torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(compiled(model)(x), model(x))
        assert qs.reports()[-1].linears == (0, 0)

    def test_no_tensor_but_constants(self) -> None:
        out = torch.compile(lambda: torch.arange(5).float().cos(), backend="quantsparse")()
        torch.testing.assert_close(out, torch.arange(5).float().cos())

    @pytest.mark.filterwarnings(NO_SIGNAL)
    def test_an_exotic_model(self) -> None:
        torch.manual_seed(0)
        model, video = ExoticDiT().eval(), torch.randn(1, 3, 10, 20, 20)  # 1,000 tokens
        want = model(video)
        fast = compiled(model, recipe={**RECIPE, "block_size": 128})
        assert relative_error(fast(video), want) < 0.02
        report = qs.reports()[-1]
        assert (report.linears, report.attentions) == ((4, 5), (2, 2))
        assert report.skipped("quantize_linear")[0][1] == "the weight is computed in the graph"
        with qs.denoising(model, 4) as run:
            for i in range(3):
                run.step(i)
                out = fast(video)
        assert report.calls == {"dense": 1, "refresh": 1, "sparse": 2}
        assert relative_error(out, want) < 0.05  # the inputs of its refresh: the correction makes up for the mask

    @pytest.mark.parametrize("recipe", ["w8a8", RECIPE], ids=["dense", "sparse"])
    def test_an_empty_batch(self, recipe: str | dict) -> None:
        model = compiled(make(), recipe=recipe)
        with qs.denoising(model, 3) as run:
            for i, inputs in enumerate(clip(7, 3, batch=0)):
                run.step(i)
                assert model(**inputs).shape == (0, 320, 32)


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"mode": "reduce-overhead"}}])
def test_mode_and_fingerprint_go_with_this_compile_alone(given: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen = []

    def record(module, inputs, patches, own_context):
        seen.append(patches)
        return module.forward

    monkeypatch.setattr(_compat, "compile_graph", record)
    before = (config.post_grad_custom_pre_pass, config.triton.cudagraphs)
    torch.compile(make(), backend="quantsparse", **given)(**clip(7, 1)[0])
    assert seen[0]["triton.cudagraphs"] is True
    key = seen[0]["post_grad_custom_pre_pass"].uuid()
    assert key is not None and "w8a8" in str(key)
    assert (config.post_grad_custom_pre_pass, config.triton.cudagraphs) == before


class TestCallerErrors:
    """Each reaches the caller as our own type, with the remedy in its text."""

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"recipe": "w8a9"}, RecipeError, "did you mean 'w8a8'"),
            ({"recipe": "w8a8-d150"}, RecipeError, "integer from 1 to 100"),
            ({"recipe": "w8a8-d0"}, RecipeError, "integer from 1 to 100"),
            ({"recipe": {"density": 1.5}}, RecipeError, "above 0 and at most 1"),
            ({"interval": 0}, RecipeError, "at least 1"),
            ({"warmup": -0.1}, RecipeError, "from 0 to 1"),
            ({"recipes": "w8a8"}, OptionError, "did you mean 'recipe'"),
            ({"artifact": "/nowhere"}, ArtifactError, "no artifact at"),
            ({"mode": "fastest"}, OptionError, "Choose from"),
            ({"strict": "yes"}, OptionError, "True or False"),
            ({"recipe": 8}, RecipeError, "a name, a dict or a Recipe"),
            ({"recipe": {"cache_format": "int3"}}, RecipeError, "did you mean 'int"),
            ({"memory_budget": -1}, OptionError, "at least 0"),
            ({"debug_dir": __file__}, OptionError, "debug_dir"),
        ],
    )
    def test_options(self, options: dict, error: type, text: str) -> None:
        with pytest.raises(error, match=text):
            compiled(make(), **options)(**clip(7, 1)[0])

    def test_gradients(self) -> None:
        with torch.enable_grad(), pytest.raises(UnsupportedError, match=r"torch\.no_grad"):
            compiled(make())(**clip(7, 1)[0])

    @pytest.mark.usefixtures("eager_graphs")
    def test_inference_mode_is_fine(self) -> None:
        model = make()
        with torch.inference_mode():
            fast = compiled(model, recipe=RECIPE)
            with qs.denoising(model, 4) as run:
                for i, inputs in enumerate(clip(7, 4)):
                    run.step(i)
                    fast(**inputs)
        assert qs.reports()[-1].calls == {"dense": 0, "refresh": 1, "sparse": 3}

    def test_off_trains(self) -> None:
        model = nn.Linear(32, 32)
        with torch.enable_grad():
            compiled(model, recipe="off")(X).sum().backward()
        torch.testing.assert_close(model.weight.grad, X.sum((0, 1)).expand(32, 32))

    def test_inputs_on_another_device(self) -> None:
        inputs = {name: x.to("meta") for name, x in clip(7, 1)[0].items()}
        with pytest.raises(RuntimeError, match=r"(?s)cpu.*meta|meta.*cpu"):
            compiled(make())(**inputs)

    def test_a_model_on_a_device_without_a_backend(self) -> None:
        inputs = {name: x.to("meta") for name, x in clip(7, 1)[0].items()}
        with pytest.raises(DeviceError, match="'meta', and this backend compiles for cpu and cuda"):
            compiled(make().to("meta"))(**inputs)

    @pytest.mark.usefixtures("eager_graphs")
    def test_strict_names_what_stays(self) -> None:
        with pytest.raises(UnsupportedError, match=r"linear \(embed\): .*`keep`"):
            compiled(make(), strict=True)(**clip(7, 1)[0])

    @pytest.mark.usefixtures("eager_graphs")
    def test_strict_takes_what_keep_names(self) -> None:
        model, keep = make(), ["proj_*", "embed", "*modulation"]
        inputs = clip(7, 1)[0]
        out = compiled(model, strict=True, recipe={"format": "w8a8", "keep": keep})(**inputs)
        assert relative_error(out, model(**inputs)) < 0.05
        assert qs.reports()[-1].linears == (8, 13)

    def test_a_model_that_is_attached_already(self) -> None:
        model = qs.attach(make())
        with pytest.raises(UnsupportedError, match="attached already"):
            qs.attach(model)

    def test_blocks_that_cannot_be_compiled_apart(self) -> None:
        """Nothing is changed where `compile` cannot be followed."""
        model, one = make(), nn.Sequential(nn.Linear(16, 16))
        with pytest.raises(OptionError, match='True, False or "blocks", not \'block\''):
            qs.attach(model, compile="block")
        with pytest.raises(OptionError, match="densities by name"):
            qs.attach(model, recipe={**RECIPE, "overrides": {"blocks.1": {"density": 1.0}}}, compile="blocks")
        with pytest.raises(UnsupportedError, match="no repeated blocks"):
            qs.attach(one, compile="blocks")
        assert type(model.blocks[0].up) is nn.Linear and type(one[0]) is nn.Linear

    def test_nothing_to_attach(self) -> None:
        with pytest.raises(UnsupportedError, match=r"no .*linears"):
            qs.attach(nn.Sequential(nn.Conv2d(3, 8, 3)))

    def test_an_artifact_of_another_model_changes_nothing(self, tmp_path) -> None:
        from qs_compiler.packing import pack_weight

        model = make(1)
        layers = {"blocks.0.up": pack_weight(model.blocks[0].up.weight, qs.Recipe())}
        qs.Artifact.of(model, qs.Recipe(), layers).save(tmp_path / "a.qs")
        other = make(2)
        with pytest.raises(ArtifactError, match="other values"):
            qs.attach(other, tmp_path / "a.qs")
        assert type(other.blocks[0].up) is nn.Linear


class TestMemory:
    def test_attach_frees_the_16_bit_weights(self) -> None:
        """Resident memory of a process that attaches a model with 256 MiB of linears."""
        out = run_python(
            """
            import ctypes, os, torch
            import qs_compiler as qs
            from tests.backend.models import TinyDiT

            def resident():
                ctypes.CDLL(None).malloc_trim(0)  # what the process freed and its allocator kept does not count
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

            torch.set_num_threads(1)
            model = TinyDiT(blocks=8, width=768)
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            linears = sum(p.nbytes for p in model.blocks.parameters()) / 2**20
            before = resident()
            qs.attach(model, recipe="w4a8", compile=False)
            print(linears, before - resident())
            """
        )
        linears, freed = map(float, out.split())
        assert linears > 250
        assert freed > 0.7 * linears  # 7/8 is what int4 saves of fp32; allocators keep a little

    def test_what_is_stored(self) -> None:
        model = qs.attach(TinyDiT(width=256), recipe="w4a8", compile=False)
        stored = sum(b.nbytes for m in model.blocks.modules() for b in m.buffers(recurse=False))
        weights = sum(m.in_features * m.out_features for m in model.blocks.modules() if hasattr(m, "in_features"))
        assert 0.5 <= stored / weights < 0.53  # half a byte a weight, multipliers and row scales
