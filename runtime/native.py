"""What wgpu-native offers beyond WebGPU, and what its own C functions do faster than wgpu-py's methods.

The only module that touches wgpu-py's internals. Where something is missing (another wgpu backend or version), the
functions say so and their callers do without.
"""

from __future__ import annotations

from typing import Any

from wgpu.backends.wgpu_native import _api, _helpers
from wgpu.backends.wgpu_native.extras import set_instance_extras

lib, ffi = _api.lib, _api.ffi


def prepare_instance() -> bool:
    """Create wgpu's instance without its own checks of indirect dispatches, each of which costs a dispatch.

    Returns whether indirect dispatches are cheap now: false where the program made its instance before. Their sizes
    are written by this package's kernels and are within limits by construction.
    """
    global _prepared
    if _prepared is None:
        _prepared = _helpers._the_instance is None
        if _prepared:
            set_instance_extras(flags=("Empty",))
    return _prepared


_prepared: bool | None = None


def unchecked_module(gpu: Any, label: str, code: str) -> Any:
    """A shader module without bounds checks and loop bounds. For kernels that say in their head why they need none.

    Raises as `create_shader_module` does.
    """
    source = _api.new_struct_p("WGPUShaderSourceWGSL *", code=_api.to_c_string_view(code))
    source[0].chain.next = ffi.NULL
    source[0].chain.sType = lib.WGPUSType_ShaderSourceWGSL
    descriptor = _api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=ffi.cast("WGPUChainedStruct *", source),
        label=_api.to_c_string_view(label),
    )
    handle = _api.libf.wgpuDeviceCreateShaderModuleTrusted(gpu._internal, descriptor, 0)
    if handle == ffi.NULL:
        raise RuntimeError("Shader module creation failed")
    return _api.GPUShaderModule(label, handle, gpu)


def subgroup_sizes(adapter: Any) -> tuple[int, int]:
    """The smallest and the largest subgroup that the adapter's kernels may run with; (0, 0) if it does not say."""
    info = adapter.info
    low = info.get("subgroup_min_size", info.get("stackgroup_min_size", 0))
    high = info.get("subgroup_max_size", info.get("stackgroup_max_size", 0))
    return int(low or 0), int(high or 0)
