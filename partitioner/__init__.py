"""The ExecuTorch partitioner of the WebGPU delegate."""

from .partitioner import WebGPUPartitioner, separate_outputs

__all__ = ["WebGPUPartitioner", "separate_outputs"]
