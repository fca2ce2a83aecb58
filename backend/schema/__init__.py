"""The FlatBuffer schema of the blob and its generated code.

`webgpu_graph_generated.py` is made from `webgpu_graph.fbs` by `python -m executorch_webgpu.backend.schema`; a test
makes it again and compares.
"""
