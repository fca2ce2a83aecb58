"""Ahead of time: records of a delegated subgraph, their blob, and the passes and translation that make them.

`graph` and `serialize` need neither torch nor wgpu; `preprocess` (the ExecuTorch backend class) is imported on demand.
"""
