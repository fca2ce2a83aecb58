"""Benchmarks on GPU timestamps; see README.md. They need wgpu, numpy and flatbuffers only."""
