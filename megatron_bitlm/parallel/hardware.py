"""What GPUs can do, from their vendors' data sheets; for the planner and for MFU.

Peaks are dense (data sheets print twice as much, with sparsity). Memory is in decimal bytes as sold, a little less than
the driver reports. Link rates are of one direction (NVIDIA prints both together). The network is what NVIDIA's own
8-GPU systems of each generation carry: one adapter a GPU.

Sources: "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" data sheets (SXM columns); "NVIDIA A100 Tensor
Core GPU" data sheet (80 GB SXM); "NVIDIA HGX Platform" page and "NVIDIA Blackwell Architecture Technical Brief" (HGX
B200, an eighth of the board); DGX A100, H100, H200 and B200 data sheets for the adapters (200 Gb/s, then 400 Gb/s).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bitlm.errors import BitLMError


@dataclass(frozen=True)
class Gpu:
    """Figures of one GPU: FLOP/s, bytes and bytes/s; `fp8_flops` is None where there is no FP8."""

    name: str
    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int = 8

    def peak(self, precision: str) -> float:
        """FLOP/s at `fp8`, `bf16` or `fp32` (without TF32).

        Raises:
            BitLMError: FP8 on a GPU that has none.
        """
        if precision == "fp8":
            if self.fp8_flops is None:
                raise BitLMError(f"training.fp8.recipe asks for FP8, which the {self.name} lacks; set it to none")
            return self.fp8_flops
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


# name, BF16, FP8, FP32 FLOP/s; memory bytes and bytes/s; NVLink and network bytes/s one way.
_GPUS = (
    Gpu("A100", 312e12, None, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    Gpu("H100", 989e12, 1979e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    Gpu("H200", 989e12, 1979e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    Gpu("B200", 2250e12, 4500e12, 80e12, 180e9, 8.0e12, 900e9, 50e9),
)
# Cards of other speeds that carry such a name.
_OTHER_CARDS = ("H100 PCIe", "H100 NVL", "H200 NVL", "GB200")


def gpu_names() -> list[str]:
    """The GPUs known, in lower case."""
    return [gpu.name.lower() for gpu in _GPUS]


def find_gpu(name: str) -> Gpu:
    """The figures of a GPU by its name in any case.

    Raises:
        BitLMError: A GPU that is not in the table.
    """
    for gpu in _GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    raise BitLMError(f"--gpu {name}: no such GPU is known; choose one of {', '.join(gpu_names())}")


def gpu_of_device(device_name: str) -> Gpu | None:
    """The figures for a device's own name, such as "NVIDIA H100 80GB HBM3"; None where they are not known."""
    if any(card in device_name for card in _OTHER_CARDS):
        return None
    return next((gpu for gpu in _GPUS if gpu.name in device_name), None)
