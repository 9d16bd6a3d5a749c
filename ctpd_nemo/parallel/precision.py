"""Number formats: weights and activations in fp32 or bf16, matrix products in FP8 through Transformer Engine."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layers import transformer_engine_available

# What each recipe is called in Megatron-Core, and what the shapes of its products must be multiples of: tokens a
# rank in its part of a sequence, and widths. Of Transformer Engine 2.11: cuBLAS wants 16, MXFP8 scales blocks of 32,
# block scaling quantizes blocks of 128 and leaves the rest in bf16. Last, bytes of a value with its share of scales:
# one a tensor, one fp32 in 128 values, one byte in 32.
_RECIPES = {
    "delayed": ("delayed", 16, 1.0),
    "current": ("tensorwise", 16, 1.0),
    "blockwise": ("blockwise", 128, 1 + 4 / 128),
    "mxfp8": ("mxfp8", 32, 1 + 1 / 32),
}


@dataclass
class PrecisionConfig:
    """Number formats of a job; gradients and optimizer state are fp32 whatever stands here.

    Attributes:
        dtype: Weights and activations: "fp32" or "bf16".
        fp8: Recipe of the matrix products in the transformer layers: "delayed" (a scale a tensor, from the largest
            values of past steps; frozen models take "current", as they have no steps), "current" (from this one),
            "blockwise" (a scale a block, Hopper) or "mxfp8" (a scale every 32 values, Blackwell); ``None`` for none.
            Embedding, norms, attention and output layer stay in bf16.
        fp8_format: "hybrid" (E4M3 forward, E5M2 for gradients) or "e4m3" for both.
        amax_history: Steps that "delayed" looks back.
        bf16_first_layers: Layers at the beginning of the model whose products stay in bf16; not with "delayed".
        bf16_last_layers: Layers at its end, likewise.
        fp8_frozen_weights: Frozen models hold the weights of those products in FP8 only: half the memory of bf16.
    """

    dtype: str = "bf16"
    fp8: str | None = None
    fp8_format: str = "hybrid"
    amax_history: int = 1024
    bf16_first_layers: int = 0
    bf16_last_layers: int = 0
    fp8_frozen_weights: bool = False

    @property
    def name(self) -> str:
        """What results depend on, in a word or two: "bf16", "fp8_current", "fp8_blockwise e4m3 bf16 layers 1+1"."""
        if self.fp8 is None:
            return self.dtype
        words = ["mxfp8" if self.fp8 == "mxfp8" else f"fp8_{self.fp8}"]
        words += [self.fp8_format] if self.fp8_format != "hybrid" else []
        words += [f"history {self.amax_history}"] if self.fp8 == "delayed" and self.amax_history != 1024 else []
        if self.bf16_first_layers or self.bf16_last_layers:
            words.append(f"bf16 layers {self.bf16_first_layers}+{self.bf16_last_layers}")
        return " ".join(words)

    @property
    def token_multiple(self) -> int:
        """What the number of tokens on a rank must be a multiple of."""
        return 1 if self.fp8 is None else _RECIPES[self.fp8][1]

    @property
    def fp8_bytes(self) -> float:
        """Bytes of a value in FP8, its share of the scales included; 0 without a recipe."""
        return 0.0 if self.fp8 is None else _RECIPES[self.fp8][2]

    @property
    def frozen_matrix_bytes(self) -> float:
        """Bytes of a weight of the layers' matrices in a frozen model: in FP8 in place of ``dtype``, or beside it."""
        return self.fp8_bytes + (0 if self.fp8_frozen_weights else self.torch_dtype().itemsize)

    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if self.dtype not in dtypes:
            raise InputError("precision.dtype", repr(self.dtype), " or ".join(dtypes))
        return dtypes[self.dtype]

    def of_frozen(self) -> "PrecisionConfig":
        """Of a model that only ever runs forward.

        Transformer Engine takes the largest values of past steps into a scale where there are gradients alone: without,
        a delayed scale would stay at 1 for ever, and clip (``FP8GlobalStateManager``, 2.9 to 2.17).
        """
        return replace(self, fp8="current") if self.fp8 == "delayed" else self

    def check(self) -> None:
        """Stop with an ``InputError`` where values do not go together; needs no GPU."""
        self.torch_dtype()
        if self.fp8 is None:
            for name in ("bf16_first_layers", "bf16_last_layers", "fp8_frozen_weights"):
                if getattr(self, name):
                    raise InputError(f"precision.{name}", str(getattr(self, name)), "a recipe in precision.fp8 with it")
            return
        if self.fp8 not in _RECIPES:
            raise InputError("precision.fp8", repr(self.fp8), "null or one of " + ", ".join(_RECIPES))
        if self.dtype != "bf16":
            raise InputError("precision.dtype", f"{self.dtype} with fp8 {self.fp8}", "bf16")
        if self.fp8_format not in ("hybrid", "e4m3"):
            raise InputError("precision.fp8_format", repr(self.fp8_format), "hybrid or e4m3")
        if self.amax_history < 1:
            raise InputError("precision.amax_history", str(self.amax_history), "1 step or more")
        for name in ("bf16_first_layers", "bf16_last_layers"):
            layers = getattr(self, name)
            if layers < 0:
                raise InputError(f"precision.{name}", str(layers), "0 or more")
            if layers and self.fp8 == "delayed":
                raise InputError(f"precision.{name}", f"{layers} with fp8 delayed", "0, or another recipe")

    def check_device(self, context: int = 1) -> None:
        """Stop with an ``InputError`` where this machine cannot compute in these formats, in ``context`` shares."""
        if self.dtype == "fp32" and context > 1 and transformer_engine_available():
            # Its fused attention has no fp32, and its other one no context parallelism.
            raise InputError("precision.dtype", f"fp32 with parallel.context {context} on a GPU", "bf16, or context 1")
        if self.fp8 is None:
            return
        if not transformer_engine_available():
            raise InputError("precision.fp8", f"{self.fp8} on a machine without it", "a GPU and Transformer Engine")
        found = torch.cuda.get_device_capability()
        needed = (10, 0) if self.fp8 == "mxfp8" else (9, 0) if self.fp8 == "blockwise" else (8, 9)
        if found < needed:
            raise InputError(
                "precision.fp8",
                f"{self.fp8} on compute capability {found[0]}.{found[1]}",
                f"{needed[0]}.{needed[1]} or later",
            )
        cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
        if self.fp8 == "blockwise" and cuda < (12, 9):
            raise InputError("precision.fp8", f"blockwise on CUDA {torch.version.cuda}", "CUDA 12.9 or later")

    def check_width(self, what: str, width: int, shares: int) -> None:
        """Stop with an ``InputError`` where FP8 products cannot have a rank's share of a width."""
        if self.fp8 is not None and width % (shares * self.token_multiple):
            raise InputError(
                "precision.fp8",
                f"{self.fp8} for {what} {width} in {shares} shares",
                f"shares that are multiples of {self.token_multiple}",
            )

    def megatron_arguments(self, frozen: bool) -> dict[str, Any]:
        """These formats as arguments of Megatron-Core's ``TransformerConfig``; ``frozen`` weights never change."""
        dtype = self.torch_dtype()
        arguments: dict[str, Any] = {
            "params_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "pipeline_dtype": dtype,
        }
        if self.fp8 is None:
            return arguments
        return arguments | {
            "fp8": self.fp8_format,
            "fp8_recipe": _RECIPES[self.fp8][0],
            "fp8_amax_history_len": self.amax_history,
            "fp8_amax_compute_algo": "max",
            "fp8_param": frozen and self.fp8_frozen_weights,
            "first_last_layers_bf16": bool(self.bf16_first_layers or self.bf16_last_layers),
            "num_layers_at_start_in_bf16": self.bf16_first_layers,
            "num_layers_at_end_in_bf16": self.bf16_last_layers,
        }
