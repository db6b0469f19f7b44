import pytest
import torch

from qs_compiler.demo import model as demo
from qs_compiler.demo.captions import EXAMPLE
from qs_compiler.errors import ArtifactError

TINY = {
    "transformer": {**demo.CONFIG["transformer"], "num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64},
    "text": demo.CONFIG["text"],
}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    transformer, text = demo.build_model(TINY)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    return transformer.eval(), text.eval()


def test_weights_come_back_in_bf16_and_wans_fp32_modules_stay_fp32(tiny, tmp_path):
    demo.save_model(*tiny, tmp_path, TINY)
    transformer, _ = demo.load_model(dtype=torch.bfloat16, folder=tmp_path)
    for (name, was), now in zip(tiny[0].named_parameters(), transformer.parameters(), strict=True):
        assert torch.equal(was.bfloat16().float(), now.float()), name
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert transformer.rope.freqs_cos.dtype == torch.float32


def test_a_missing_model_says_how_to_get_one(tmp_path):
    with pytest.raises(ArtifactError, match=r"qs_compiler\.demo\.train"):
        demo.load_model(folder=tmp_path)


def test_sampling_is_seeded_and_announces_every_call(tiny):
    calls, done = [], []
    settings = {"frames": 2, "side": 8, "num_steps": 2}
    clips = demo.sample(
        *tiny, [EXAMPLE], **settings, on_call=lambda *c: calls.append(c), progress=lambda *p: done.append(p)
    )
    assert clips.shape == (1, 3, 2, 8, 8) and clips.min() >= 0 and clips.max() <= 1
    assert calls == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert done == [(1, 2), (2, 2)]
    assert torch.equal(clips, demo.sample(*tiny, [EXAMPLE], **settings))
    assert not torch.equal(clips, demo.sample(*tiny, [EXAMPLE], **settings, seed=1))


def test_guidance_one_is_one_call_a_step_and_guidance_extrapolates(tiny):
    calls = []
    settings = {"frames": 2, "side": 8, "num_steps": 1}
    plain = demo.sample(*tiny, [EXAMPLE], **settings, guidance=1.0, on_call=lambda *c: calls.append(c))
    assert calls == [(0, "cond")]
    assert not torch.equal(plain, demo.sample(*tiny, [EXAMPLE], **settings, guidance=3.0))


def test_the_sampler_recovers_a_clip_from_its_exact_velocity(tiny):
    clip = torch.rand(1, 3, 2, 8, 8) * 2 - 1

    def exact(hidden_states, timestep, **_):
        level = (timestep / 1000)[:, None, None, None, None]
        return ((hidden_states - clip) / level,)

    assert torch.allclose(demo.sample(exact, tiny[1], [EXAMPLE], frames=2, side=8), (clip + 1) / 2, atol=1e-4)


def test_noise_levels_fall_from_one_and_crowd_at_high_noise():
    sigmas = demo.make_scheduler(10, shift=6.0).sigmas
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[5] == pytest.approx(6 * 0.5 / (1 + 5 * 0.5))
