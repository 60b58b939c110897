"""LoRA matrices in a backbone's last blocks (Hu et al. 2021), with everything below frozen and run once a scan.

The blocks keep the names that they have in the whole backbone, so that an adapter's folder is one that
`peft.PeftModel.from_pretrained` puts on the whole backbone too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinoatten3d.config import LoraConfig
from dinoatten3d.errors import ConfigError, RunError
from dinoatten3d.features.backbone import BATCH, Backbone, to_rgb

KINDS = ("dinov2", "dinov2_with_registers")
"""Model types of transformers whose blocks are a plain sequence between embeddings and a final norm."""


class UpperBlocks(nn.Module):
    """Copies of a backbone's last blocks and of its final norm."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        count = len(model.encoder.layer)
        last = {str(n): copy.deepcopy(model.encoder.layer[n]) for n in range(count - blocks, count)}
        self.encoder = nn.ModuleDict({"layer": nn.ModuleDict(last)})
        self.layernorm: nn.LayerNorm = copy.deepcopy(model.layernorm)

    def forward(self, entry: Float[Tensor, "slices tokens dim"]) -> Float[Tensor, "slices dim"]:
        """Turn the tokens at the entry of the first of these blocks into the CLS token after the final norm."""
        tokens: Tensor = self.layernorm(_through(self.encoder["layer"].children(), entry))
        return tokens[:, 0]


def enter(backbone: Backbone, pixels: NDArray[np.uint8], blocks: int) -> NDArray[np.float16]:
    """Run all but the last blocks.

    Args:
        backbone: The encoder.
        pixels: 8-bit grey, `[slices, height, width]`.
        blocks: How many blocks are left for `UpperBlocks`.

    Returns:
        Tokens at the entry of the first block that is left, `[slices, tokens, dim]`.

    Raises:
        ConfigError: The backbone has another structure or too few blocks.
    """
    _check(backbone, blocks)
    model, found = backbone.model, []
    with torch.inference_mode():
        for part in torch.from_numpy(pixels).split(BATCH):
            tokens = model.embeddings(to_rgb(part.to(backbone.device), backbone.pixels))
            found.append(_through(model.encoder.layer[: backbone.layers - blocks], tokens).half().cpu())
    return torch.cat(found).numpy()


def adapted_blocks(backbone: Backbone, config: LoraConfig) -> nn.Module:
    """Put fresh matrices beside every linear layer of copies of the last blocks; the backbone itself stays untouched.

    The first of each pair is drawn from torch's own generator and the second is zero: nothing has changed yet.

    Raises:
        ConfigError: peft is not installed, or the backbone has another structure or too few blocks.
    """
    try:
        import accelerate  # noqa: F401
        import peft
    except ImportError:
        raise ConfigError('adaptation needs peft and accelerate; pip install "dinoatten3d[adapt]"') from None
    _check(backbone, config.blocks)
    backbone.model.set_attn_implementation("sdpa")
    upper = UpperBlocks(backbone.model, config.blocks)
    targets = [name for name, module in upper.named_modules() if isinstance(module, nn.Linear)]
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets
    )
    adapted: nn.Module = peft.get_peft_model(upper, settings).to(backbone.device)
    return adapted


def embed_entries(upper: nn.Module, entries: Iterable[NDArray[np.float16]]) -> Tensor:
    """Give the CLS tokens of scans of `[slices, tokens, dim]` each under these blocks, `[scans, slices, dim]`."""
    device = next(upper.parameters()).device
    upper.eval()
    with torch.no_grad():
        return torch.stack([upper(torch.from_numpy(np.array(entry)).to(device).float()).cpu() for entry in entries])


def adapter_tensors(upper: nn.Module) -> dict[str, Tensor]:
    """Give copies of the matrices under peft's names; nothing of the backbone is among them."""
    import peft

    return {k: t.detach().cpu().clone() for k, t in peft.get_peft_model_state_dict(upper).items()}


def set_adapter_tensors(upper: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put matrices in place.

    Raises:
        RunError: They are not the matrices of these blocks.
    """
    import peft

    wanted = {name: tensor.shape for name, tensor in adapter_tensors(upper).items()}
    if wanted != {name: tensor.shape for name, tensor in tensors.items()}:
        odd = sorted(n for n in wanted.keys() | tensors.keys() if n not in tensors or tensors[n].shape != wanted.get(n))
        raise RunError(f"the adapter does not fit this backbone's last blocks, such as in {odd[0]}; train again")
    peft.set_peft_model_state_dict(upper, tensors)


def write_adapter(folder: Path, tensors: dict[str, Tensor], settings: Any) -> None:
    """Write an adapter the way peft does: `adapter_config.json` and `adapter_model.safetensors`."""
    settings.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def read_adapter(folder: Path, backbone: Backbone, config: LoraConfig) -> nn.Module:
    """Read an adapter onto copies of the backbone's last blocks; only its safetensors file is read.

    Raises:
        RunError: The file is missing, damaged or of other blocks.
    """
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is missing or damaged ({error}); train again") from None
    upper = adapted_blocks(backbone, config)
    set_adapter_tensors(upper, tensors)
    return upper.eval()


def _through(blocks: Iterable[Any], tokens: Tensor) -> Tensor:
    for block in blocks:
        out = block(tokens)
        tokens = out[0] if isinstance(out, tuple) else out  # older transformers wrap it
    return tokens


def _check(backbone: Backbone, blocks: int) -> None:
    kind = backbone.model.config.model_type
    if kind not in KINDS:
        raise ConfigError(f"{backbone.weights.name} is a {kind} model; --adapt lora knows {' and '.join(KINDS)}")
    if blocks > backbone.layers:
        raise ConfigError(
            f"lora.blocks is {blocks}, but {backbone.weights.name} has {backbone.layers} blocks; take fewer"
        )
