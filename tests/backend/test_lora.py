"""LoRA adapters of PEFT: loaded before or after attach, beside packed linears, never lost."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

import qs_compiler as qs
from qs_compiler.errors import UnsupportedError
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.pipeline import plan_layers
from tests.backend.diffusers_models import at_step, make
from tests.backend.pipelines import PIPELINES, run
from tests.tolerances import assert_close, relative_error

WRAPPED = ["to_q", "to_k", "to_v", "to_out.0"]
SPARSE = {"format": "w4a8", "density": 0.25, "block_size": 64, "warmup": 0.25, "interval": 3}
STEPS = 4
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*"),
]


def adapt(model: nn.Module) -> nn.Module:
    """Wrap the attention's linears in adapters of rank 4 that change the output by some per cent."""
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=WRAPPED)
    model.add_adapter(config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    return model.requires_grad_(False)


def denoise(model: nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    with qs.denoising(model, STEPS) as video:
        out = []
        for i in range(STEPS):
            video.step(i)
            out.append(model(**at_step(inputs, i, STEPS))[0])
    return torch.stack(out)


def sparse_calls() -> int:
    return sum(report.calls["sparse"] for report in qs.reports())


def test_a_packed_weight_and_an_adapter_add_up() -> None:
    (model, inputs), (plain, _) = make("wan"), make("wan")
    base = model(**inputs)[0]
    adapt(qs.attach(model, recipe="w4a16"))
    for name, linear in plain.named_modules():
        module = model.get_submodule(name)
        if isinstance(packed := getattr(module, "base_layer", module), PackedLinear):
            linear.weight.data = packed.weight
            if packed is not module:
                linear.weight.data += module.lora_B["default"].weight @ module.lora_A["default"].weight
    want = plain(**inputs)[0]
    assert relative_error(want, base) > 0.03
    assert_close(model(**inputs)[0], want)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_it_matters_not_when_the_adapter_came(name: str) -> None:
    model, inputs = make(name)
    artifact = qs.calibrate(model, [inputs], recipe="w8a8", progress=False)
    before, after, rounded = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    plain = relative_error(qs.attach(copy.deepcopy(model), recipe="w8a8")(**inputs)[0], model(**inputs)[0])
    want = adapt(copy.deepcopy(model))(**inputs)[0]
    first = qs.attach(adapt(before), artifact)(**inputs)[0]
    report = qs.reports()[-1]
    kept = [node for node, reason in report.skipped("quantize_linear") if reason == "part of a LoRA adapter"]
    packed = [n for n, m in before.named_modules() if isinstance(m, PackedLinear)]
    wrapped = [n for n in packed if n.endswith("base_layer")]
    assert len(kept) >= 2 * len(wrapped) >= 16 and report.linears[0] >= len(wrapped)
    qs.attach(after, artifact)
    after(**inputs)
    assert torch.equal(adapt(after)(**inputs)[0], first), "loaded after attach"
    rounded = qs.attach(adapt(rounded), recipe="w8a8")(**inputs)[0]
    changed = relative_error(want, model(**inputs)[0])
    assert max(relative_error(out, want) for out in (first, rounded)) < min(2 * plain, changed / 3)


@pytest.mark.parametrize("compiled", [True, "blocks"])
def test_sparse_steps_with_an_adapter_that_comes_and_goes(compiled: bool | str) -> None:
    model, inputs = make("wan")
    alone = denoise(qs.attach(copy.deepcopy(model), recipe=SPARSE, compile=compiled), inputs)
    adapted = denoise(qs.attach(adapt(copy.deepcopy(model)), recipe=SPARSE, compile=compiled), inputs)
    assert relative_error(adapted, alone) > 0.02
    qs.attach(model, recipe=SPARSE, compile=compiled)
    assert torch.equal(denoise(model, inputs), alone)
    before = sparse_calls()
    assert torch.equal(denoise(adapt(model), inputs), adapted)
    assert sparse_calls() > before
    model.disable_adapters()
    assert_close(denoise(model, inputs), alone)
    model.enable_adapters()
    assert torch.equal(denoise(model, inputs), adapted)
    model.unload_lora()
    assert torch.equal(denoise(model, inputs), alone)


@pytest.mark.usefixtures("eager_graphs")
def test_a_pipeline_loads_and_unloads_one(tmp_path) -> None:
    layers = get_peft_model_state_dict(adapt(make("wan")[0]))
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    def pipeline():
        pipe = PIPELINES["wan"]()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    recipe = {"density": 0.5, "block_size": 64, "interval": 4}
    before, after = pipeline(), qs.attach(pipeline(), recipe=recipe)
    alone = run("wan", after)
    before.load_lora_weights(tmp_path)
    want = run("wan", qs.attach(before, recipe=recipe))
    after.load_lora_weights(tmp_path)
    assert torch.equal(run("wan", after), want) and relative_error(want, alone) > 0.01
    after.unload_lora_weights()
    assert torch.equal(run("wan", after), alone)


def test_a_fused_adapter_is_packed_with_the_weight() -> None:
    model, inputs = make("wan")
    adapt(model).fuse_lora()
    model.unload_lora()
    want = model(**inputs)[0]
    qs.attach(model, recipe="w8a8")
    assert all("lora" not in name for name, _ in model.named_modules())
    assert relative_error(model(**inputs)[0], want) < 0.01


@pytest.mark.parametrize("call", ["fuse_lora", "unfuse_lora"])
def test_packed_weights_take_no_adapter_in(call: str) -> None:
    model, inputs = make("wan")
    adapt(qs.attach(model, recipe="w8a8"))
    before = model(**inputs)[0]
    with pytest.raises(UnsupportedError, match=r"cannot be fused into packed weights.*load the 16-bit pipeline"):
        getattr(model, call)()
    assert torch.equal(model(**inputs)[0], before)


def test_a_layer_keeps_its_name_behind_an_adapter() -> None:
    model = adapt(make("wan")[0])
    overrides = {"*.to_k": {"format": "w4a8"}}
    recipe = qs.Recipe.parse({"format": "w8a8", "keep": ["blocks.0.attn1.to_q"], "overrides": overrides})
    plan = plan_layers(model, recipe)
    assert "blocks.0.attn1.to_q.base_layer" not in plan and "blocks.1.attn1.to_q.base_layer" in plan
    assert plan["blocks.1.attn1.to_k.base_layer"].format == "w4a8"
    assert not any("lora_" in name for name in plan)


def test_calibration_wants_the_adapter_fused_or_gone() -> None:
    model, inputs = make("wan")
    with pytest.raises(UnsupportedError, match=r"carries LoRA adapters.*fuse_lora\(\); pipe.unload_lora_weights\(\)"):
        qs.calibrate(adapt(model), [inputs], recipe="w8a8", progress=False)


def test_an_exported_program_keeps_adapters_in_16_bit() -> None:
    model, inputs = make("wan")
    artifact = qs.calibrate(model, [inputs], recipe="w8a8", progress=False)
    program = torch.export.export(adapt(model), (), inputs)
    want, plain = program.module()(**inputs)[0], make("wan")[0](**inputs)[0]
    for how in ({"recipe": "w8a8"}, {"artifact": artifact}):
        small = qs.compress(program, **how)
        error = relative_error(small.module()(**inputs)[0], want)
        assert error < 0.01 < relative_error(want, plain)
