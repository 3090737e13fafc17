"""The whole structure of Stable Diffusion v1, on the meta device, against the names and shapes of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mu.ldm import CheckpointError, LatentDiffusion, load_model, save_checkpoint

REFERENCE = Path(__file__).parents[1] / "reference" / "sd_v1_state_dict_shapes.json"

# v1-inference.yaml, as CompVis publishes it.
SD_V1_YAML = """
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false   # Note: different from the one we trained before
    conditioning_key: crossattn
    monitor: val/loss_simple_ema
    scale_factor: 0.18215
    use_ema: False

    scheduler_config: # 10000 warmup steps
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [ 10000 ]
        cycle_lengths: [ 10000000000000 ] # incredibly large number to prevent corner cases
        f_start: [ 1.e-6 ]
        f_max: [ 1. ]
        f_min: [ 1. ]

    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32 # unused
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [ 4, 2, 1 ]
        num_res_blocks: 2
        channel_mult: [ 1, 2, 4, 4 ]
        num_heads: 8
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: True
        legacy: False

    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult:
          - 1
          - 2
          - 4
          - 4
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity

    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


@pytest.fixture(scope="module", params=["ldm.", "stable_diffusion.ldm."])
def sd_v1(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    path = tmp_path_factory.mktemp("sd_v1") / "v1-inference.yaml"
    path.write_text(SD_V1_YAML.replace("target: ldm.", f"target: {request.param}"), encoding="utf-8")
    return load_model(path, device="meta")


def shapes_of(model: LatentDiffusion) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def clip_vit_l_14_shapes() -> dict[str, list[int]]:
    """The text model of CLIP ViT-L/14: 49408 tokens, 77 positions, 12 layers 768 wide, 3072 inside."""
    norm = {"weight": [768], "bias": [768]}
    layer = {
        **{f"self_attn.{p}_proj.weight": [768, 768] for p in ("k", "v", "q", "out")},
        **{f"self_attn.{p}_proj.bias": [768] for p in ("k", "v", "q", "out")},
        **{f"layer_norm{i}.{part}": shape for i in (1, 2) for part, shape in norm.items()},
        "mlp.fc1.weight": [3072, 768],
        "mlp.fc1.bias": [3072],
        "mlp.fc2.weight": [768, 3072],
        "mlp.fc2.bias": [768],
    }
    return {
        "embeddings.token_embedding.weight": [49408, 768],
        "embeddings.position_embedding.weight": [77, 768],
        **{f"encoder.layers.{i}.{name}": shape for i in range(12) for name, shape in layer.items()},
        **{f"final_layer_norm.{part}": shape for part, shape in norm.items()},
    }


def test_unet_autoencoder_and_schedule(sd_v1: LatentDiffusion) -> None:
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    ours = {k: s for k, s in shapes_of(sd_v1).items() if not k.startswith("cond_stage_model.")}
    assert sum(key.startswith("model.diffusion_model.") for key in ours) == 686
    assert sum(key.startswith("first_stage_model.") for key in ours) == 248
    assert ours == reference


def test_text_encoder(sd_v1: LatentDiffusion) -> None:
    prefix = "cond_stage_model.transformer.text_model."
    ours = {k: s for k, s in shapes_of(sd_v1).items() if k.startswith("cond_stage_model.")}
    ours.pop(f"{prefix}embeddings.position_ids", None)  # a constant that some releases of transformers keep
    assert len(ours) == 196
    assert ours == {prefix + name: shape for name, shape in clip_vit_l_14_shapes().items()}


def test_sizes(sd_v1: LatentDiffusion) -> None:
    assert sum(p.numel() for p in sd_v1.unet.parameters()) == 859_520_964
    assert sd_v1.num_timesteps == 1000
    assert sd_v1.scale_factor == 0.18215
    assert sd_v1.image_size == 512
    assert sd_v1.latent_shape() == (4, 64, 64)
    assert sd_v1.latent_shape(768) == (4, 96, 96)


def test_nothing_was_allocated_and_nothing_can_be_saved(sd_v1: LatentDiffusion, tmp_path: Path) -> None:
    assert {tensor.device.type for tensor in sd_v1.state_dict().values()} == {"meta"}
    with pytest.raises(CheckpointError, match="meta device"):
        save_checkpoint(sd_v1, tmp_path / "m.ckpt")


@torch.no_grad()
def test_shapes_flow_through_the_whole_model(sd_v1: LatentDiffusion) -> None:
    images = torch.empty(1, 3, 512, 512, device="meta")
    mean, logvar = sd_v1.encode(images)
    assert mean.shape == logvar.shape == (1, 4, 64, 64)
    context = torch.empty(1, 77, 768, device="meta")
    predicted = sd_v1.unet(mean, torch.empty(1, device="meta"), context)
    assert predicted.shape == (1, 4, 64, 64)
    assert sd_v1.decode(predicted).shape == (1, 3, 512, 512)
