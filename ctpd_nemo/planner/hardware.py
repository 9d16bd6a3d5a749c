"""The machine, in the numbers of its data sheet, and how much of them a run is taken to reach."""

import math
from dataclasses import dataclass, fields

from ctpd_nemo.errors import InputError

GIB = 2**30


@dataclass
class Hardware:
    """One kind of GPU, and the nodes it stands in; ``conf/hardware`` has every number, and states its source.

    Attributes:
        name: As it is printed.
        memory_gib: Memory of one GPU.
        bf16_tflops: Dense matrix rate in bf16, in 1e12 operations a second.
        fp8_tflops: The same in FP8.
        fp32_tflops: The same in fp32, outside the tensor cores.
        memory_tb_per_s: Memory bandwidth, in 1e12 bytes a second.
        nvlink_gb_per_s: Bandwidth of one GPU to the others of its node, one direction, in 1e9 bytes a second.
        network_gb_per_s: Bandwidth of one GPU to other nodes, one direction.
        gpus_per_node: GPUs that NVLink joins.
        matmul_fraction: Share of the matrix rate that the products of a layer reach (assumption).
        attention_fraction: Share of the bf16 matrix rate that fused attention reaches (assumption).
        memory_fraction: Share of the memory bandwidth that element-wise kernels reach (assumption).
        link_fraction: Share of NVLink and network bandwidth that collectives reach (assumption).
        latency_us: What a collective takes beyond its bytes, in microseconds (assumption).
        layer_us: What the kernels of one layer take beyond their work, forward, in microseconds (assumption).
        step_ms: What a step takes beyond its microbatches and collectives, in milliseconds (assumption).
        start_s: What a job takes before it reads weights, in seconds (assumption).
        read_gb_per_s: What a node reads of weights from storage, in 1e9 bytes a second (assumption).
        reserved_gib: CUDA context, libraries and communication buffers (assumption).
        headroom: Share of the memory that stays free, for what the allocator cannot use (assumption).
    """

    name: str = ""
    memory_gib: float = 0.0
    bf16_tflops: float = 0.0
    fp8_tflops: float = 0.0
    fp32_tflops: float = 0.0
    memory_tb_per_s: float = 0.0
    nvlink_gb_per_s: float = 0.0
    network_gb_per_s: float = 0.0
    gpus_per_node: int = 0
    matmul_fraction: float = 0.0
    attention_fraction: float = 0.0
    memory_fraction: float = 0.0
    link_fraction: float = 0.0
    latency_us: float = 0.0
    layer_us: float = 0.0
    step_ms: float = 0.0
    start_s: float = 0.0
    read_gb_per_s: float = 0.0
    reserved_gib: float = 0.0
    headroom: float = 0.0

    def check(self) -> None:
        """Stop with an ``InputError`` where a number cannot be one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            if not 0 <= value < math.inf or (
                value == 0 and not field.name.endswith(("_us", "_ms", "start_s", "reserved_gib", "headroom"))
            ):
                raise InputError(f"hardware.{field.name}", str(value), "a positive number")
            if (field.name.endswith("fraction") and value > 1) or (field.name == "headroom" and value >= 1):
                raise InputError(f"hardware.{field.name}", str(value), "a share of at most 1")

    @property
    def usable_bytes(self) -> float:
        """What tensors may take of one GPU."""
        return (self.memory_gib * (1 - self.headroom) - self.reserved_gib) * GIB

    @property
    def memory_rate(self) -> float:
        """Bytes a second that element-wise kernels move."""
        return self.memory_tb_per_s * 1e12 * self.memory_fraction

    def matmul_rate(self, kind: str) -> float:
        """Operations a second of matrix products in "bf16", "fp8" or "fp32"."""
        return getattr(self, f"{kind}_tflops") * 1e12 * self.matmul_fraction

    def peak_rate(self, kind: str) -> float:
        """The data sheet's operations a second."""
        return getattr(self, f"{kind}_tflops") * 1e12

    @property
    def attention_rate(self) -> float:
        """Operations a second of fused attention."""
        return self.bf16_tflops * 1e12 * self.attention_fraction

    def link_rate(self, stride: int, size: int) -> float:
        """Bytes a second that each GPU of a group sends in a ring.

        Ranks are numbered node by node. Within a node the ring runs over NVLink; over nodes every member that a node
        has brings its own network card.

        Args:
            stride: Distance in ranks between neighbours of the group.
            size: Members.
        """
        in_node = self.nvlink_gb_per_s
        if stride * size > self.gpus_per_node:
            members = max(1, self.gpus_per_node // stride)
            in_node = min(in_node, members * self.network_gb_per_s)
        return in_node * 1e9 * self.link_fraction
