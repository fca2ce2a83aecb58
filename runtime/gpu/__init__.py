"""The device: adapters, buffers, pipelines, uploads, and plans of dispatches that are encoded into one pass."""
