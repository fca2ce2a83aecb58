"""The ExecuTorch partitioner of the WebGPU delegate."""

from .partitioner import WebGPUPartitioner

__all__ = ["WebGPUPartitioner"]
