"""A CUDA driver that does nothing, so that Triton's launcher runs without a GPU, up to the call of the driver."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import driver

# What Triton asks back: a context, a module and a function, properties that no kernel exceeds, and an error's text.
_RESULTS = {
    "cuCtxGetCurrent": "(void **context) { *context = (void *)1; return 0; }",
    "cuDeviceGet": "(int *device, int ordinal) { *device = ordinal; return 0; }",
    "cuDeviceGetAttribute": "(int *value, int attribute, int device) { *value = 232448; return 0; }",
    "cuFuncGetAttribute": "(int *value, int attribute, void *function) { *value = attribute ? 0 : 1024; return 0; }",
    "cuModuleLoadData": "(void **module, const void *image) { *module = (void *)1; return 0; }",
    "cuModuleGetFunction": "(void **function, void *module, const char *name) "
    "{ *function = (void *)1; return 0; }",
    "cuGetErrorString": '(int error, const char **text) { *text = "stub"; return 0; }',
}


def install(folder: Path) -> None:
    """Compiles the driver into ``folder``, loads it, and makes Triton launch on its GPU, an H100 by architecture."""
    sources = [path.read_text("utf-8") for path in Path(next(iter(nvidia.__path__))).glob("driver.*")]
    names = {name for source in sources for name in re.findall(r"\bcu[A-Z]\w+\b", source)}
    functions = (f"int {name}{_RESULTS.get(name, '() { return 0; }')}\n" for name in sorted(names))
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), f"-Wl,-soname,{library.name}"]
    subprocess.run(command, input="".join(functions), text=True, check=True)
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            launcher_cls=nvidia_driver.CudaLauncher,
            utils=nvidia_driver.CudaUtils(),
        )
    )
