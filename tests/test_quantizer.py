"""QuantSparseConfig: from_pretrained packs, save_pretrained and from_pretrained keep what is packed."""

import json
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")  # diffusers loads quantised models by it

import qs_compiler  # noqa: E402
from qs_compiler import _compat  # noqa: E402
from qs_compiler.errors import ArtifactError, RecipeError, UnsupportedError  # noqa: E402
from qs_compiler.packed_linear import PackedLinear  # noqa: E402
from qs_compiler.packing import empty_packed_weight, pack_weight  # noqa: E402
from qs_compiler.quantizer import QuantSparseConfig  # noqa: E402
from tests.export.models import wan, wan_inputs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
Wan = diffusers.WanTransformer3DModel


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Wan, saved in float32."""
    path = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(path)
    return path


def assert_same_tensors(found: nn.Module, wanted: nn.Module) -> None:
    one, two = found.state_dict(), wanted.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8)), name


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp8"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_packed_when_loaded_saved_and_loaded_again(
    checkpoint: Path, tmp_path: Path, recipe: str, dtype: torch.dtype | None
) -> None:
    how = {} if dtype is None else {"torch_dtype": dtype}
    model = Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig(recipe), **how)
    wanted = qs_compiler.attach(Wan.from_pretrained(checkpoint, **how), recipe=recipe, compile=False)
    assert_same_tensors(model, wanted)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 20
    assert model.blocks[0].norm2.weight.dtype == torch.float32
    assert model.dtype == (dtype or torch.float32)

    model.save_pretrained(tmp_path)
    again = Wan.from_pretrained(tmp_path, **how)
    assert_same_tensors(again, model)
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert again.blocks[0].attn1.to_q.weight.dtype == model.blocks[0].attn1.to_q.weight.dtype == model.dtype
    inputs = wan_inputs(dtype=model.dtype)
    # The one is mapped from a file, so its tensors lie otherwise and sums may be taken in another order.
    torch.testing.assert_close(again(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_the_saved_model_is_small_and_says_what_it_is(checkpoint: Path, tmp_path: Path) -> None:
    Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig("w4a8")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantsparse"
    assert config["recipe"]["format"] == "w4a8"
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved["blocks.0.attn1.to_q.wq"].dtype == torch.uint8
    assert "blocks.0.attn1.to_q.weight" not in saved


def test_shards(checkpoint: Path, tmp_path: Path) -> None:
    """A layer's tensors may lie in several files, of the 16-bit checkpoint as of the packed one."""
    Wan.from_pretrained(checkpoint).save_pretrained(tmp_path / "16", max_shard_size="20KB")
    assert len(list((tmp_path / "16").glob("*.safetensors"))) > 5
    model = Wan.from_pretrained(tmp_path / "16", quantization_config=QuantSparseConfig("w4a8"))
    assert_same_tensors(model, Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig("w4a8")))
    model.save_pretrained(tmp_path / "4", max_shard_size="4KB")
    assert len(list((tmp_path / "4").glob("*.safetensors"))) > 5
    assert_same_tensors(Wan.from_pretrained(tmp_path / "4"), model)


def test_kept_layers(checkpoint: Path, tmp_path: Path) -> None:
    config = QuantSparseConfig({"format": "w8a8", "keep": ["*.ffn.*"], "overrides": {"blocks.1.*": {"format": "w4a8"}}})
    model = Wan.from_pretrained(checkpoint, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = Wan.from_pretrained(tmp_path)
    for one in (model, again):
        assert type(one.blocks[0].ffn.net[2]) is nn.Linear
        assert one.blocks[0].attn1.to_q.wq.dtype == torch.int8
        assert one.blocks[1].attn1.to_q.wq.dtype == torch.uint8
    assert_same_tensors(again, model)


@pytest.mark.parametrize("first", ["diffusers", "qs_compiler"])
def test_a_fresh_process_loads_it(checkpoint: Path, tmp_path: Path, first: str) -> None:
    """Registered on import if diffusers is there, and on use of QuantSparseConfig if it comes later; never before."""
    model = Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig("w8a8"))
    model.save_pretrained(tmp_path / "model")
    torch.save((wan_inputs(), model(**wan_inputs())[0]), tmp_path / "expected.pt")
    imports = {
        "diffusers": "import diffusers, qs_compiler",
        "qs_compiler": "import qs_compiler; assert 'diffusers' not in sys.modules; from qs_compiler import "
        "QuantSparseConfig; import diffusers",
    }
    code = (
        f"import sys, torch\n{imports[first]}\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = diffusers.WanTransformer3DModel.from_pretrained({str(tmp_path / 'model')!r})\n"
        "torch.set_grad_enabled(False)\n"
        "torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(_compat, "compile_graph", lambda module, inputs, patches, own_context: module.forward)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_plain_compile_uses_the_packed_weights(checkpoint: Path, eager_graphs: None) -> None:
    model = Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig("w8a8"))
    found = torch.compile(model, backend="quantsparse")(**wan_inputs())[0]
    assert qs_compiler.reports()[-1].linears[0] == 20
    wanted = wan()(**wan_inputs())[0]
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.004


def tiny_pipeline() -> Any:
    """WanPipeline of a tiny Wan, VAE and T5, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    letters = [(c, -3.0) for c in string.ascii_lowercase + string.digits + ".,"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, decoder_start_token_id=0,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return diffusers.WanPipeline(
        tokenizer=transformers.T5Tokenizer(
            vocab=vocab, extra_ids=0, additional_special_tokens=None, model_max_length=16
        ),
        text_encoder=transformers.T5EncoderModel(config).eval(),
        vae=vae.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan(),
    )


@pytest.mark.filterwarnings("default")  # of the tokenizer's own
def test_a_pipeline_is_packed_attached_and_runs_sparse(tmp_path: Path, eager_graphs: None) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    quantization = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": QuantSparseConfig("w8a8")})
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path, quantization_config=quantization)
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, PackedLinear)
    recipe = {"format": "w8a8", "density": 0.5, "block_size": 64, "warmup": 0.0, "interval": 3}
    assert qs_compiler.attach(pipe, recipe=recipe) is pipe
    frames = pipe(
        prompt="dance monkey", num_inference_steps=4, height=128, width=128, num_frames=33, guidance_scale=1.0,
        max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert torch.isfinite(frames).all()
    report = qs_compiler.reports()[-1]
    assert report.calls == {"dense": 0, "refresh": 2, "sparse": 2}
    assert report.linears[0] == 20


# --- the caller's errors -----------------------------------------------------------------------------------------


def test_a_recipe_that_packs_nothing() -> None:
    with pytest.raises(UnsupportedError, match="recipe 'off' packs nothing"):
        QuantSparseConfig("off")
    with pytest.raises(RecipeError, match="did you mean 'w8a8'"):
        QuantSparseConfig("w8a9")


def test_a_model_without_linears_to_pack(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedError, match="this WanTransformer3DModel has no linears that can be packed"):
        Wan.from_pretrained(checkpoint, quantization_config=QuantSparseConfig({"keep": ["*"]}))


@pytest.mark.parametrize("packed", [False, True])
def test_a_checkpoint_that_lacks_a_weight(checkpoint: Path, tmp_path: Path, packed: bool) -> None:
    config = QuantSparseConfig("w8a8")
    Wan.from_pretrained(checkpoint, **({"quantization_config": config} if packed else {})).save_pretrained(tmp_path)
    name = "blocks.1.attn2.to_k." + ("ws" if packed else "weight")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"checkpoint has no '{name}'"):
        Wan.from_pretrained(tmp_path, **({} if packed else {"quantization_config": config}))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp8", "w4fp8", "w4a16", "w6a6", "w4a4"])
def test_empty_packed_weights_are_shaped_like_packed_ones(recipe: str) -> None:
    parsed = qs_compiler.Recipe.parse({"format": recipe, "group_size": 32})
    made = pack_weight(torch.randn(48, 80), parsed)
    empty = empty_packed_weight((48, 80), parsed, "meta")
    assert empty.activation == made.activation
    assert empty.shape == made.shape
    described = [{n: (t.shape, t.dtype) for n, t in p.tensors().items()} for p in (empty, made)]
    assert described[0] == described[1]
    assert all(t.is_meta for t in empty.tensors().values())
