"""What a width costs: parameters, multiply-adds and bytes. Arithmetic on the shape alone; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from scala_model.config import ScalaConfig
from scala_model.width import Width


@dataclass(frozen=True, slots=True)
class Cost:
    """``parameters`` of the dense sub-network, ``macs`` (multiply-adds) of one image through it."""

    parameters: int
    macs: int

    def num_bytes(self, bytes_per_parameter: int = 4) -> int:
        """Bytes of the weights at the given precision (4 for float32, 2 for half)."""
        return self.parameters * bytes_per_parameter


def cost_of(config: ScalaConfig, width: Width) -> Cost:
    """Parameters and multiply-adds of one image at ``width``. Matrix products only: norms and softmax are left out."""
    channels, hidden = width.channels(config.embed_dim), width.channels(config.hidden_dim)
    tokens, heads = config.num_tokens, 1 + config.distilled
    patch = 3 * config.patch_size**2 * channels
    block = 4 * channels**2 + 2 * channels * hidden
    block_biases_and_norms = 4 * channels + channels + hidden + 4 * channels
    parameters = (
        patch
        + channels
        + (config.num_tokens + heads) * channels  # position embedding, class and distillation token
        + config.depth * (block + block_biases_and_norms)
        + 2 * channels
        + heads * (channels + 1) * config.num_classes
    )
    macs = (
        config.num_patches * patch
        + config.depth * (tokens * block + 2 * tokens**2 * channels)
        + heads * channels * config.num_classes
    )
    return Cost(parameters=parameters, macs=macs)
