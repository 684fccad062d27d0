"""The optional native build; everything else is in pyproject.toml.

`pip install --no-build-isolation .` builds prism_kernels/_C.so with a C++ compiler and _C_cuda.so with nvcc. Without
one of them its library is left out, and a message says what to install. PRISM_KERNELS_REQUIRE=1 makes that an error,
PRISM_KERNELS_SKIP_BUILD=1 builds nothing, PRISM_KERNELS_CUDA=0 builds no CUDA code, PRISM_KERNELS_SANITIZE=address
builds the C++ code with that sanitizer, for `make fuzz`.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    import torch.utils.cpp_extension as cpp
except ImportError:
    cpp = None

THEN = "then run `pip install --no-build-isolation .`"
# allows only the C shims of torch 2.11, the oldest supported
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
ARCHITECTURES = "8.0;9.0a;10.0"


def skip(code: str, why: str) -> None:
    """Prints why some code is not built and how to build it; an error where PRISM_KERNELS_REQUIRE=1."""
    message = f"prism_kernels: {code} is not built: {why}; {THEN}. This installation works without it."
    if os.environ.get("PRISM_KERNELS_REQUIRE") == "1":
        raise SystemExit(
            message.replace("This installation works without it.", "PRISM_KERNELS_REQUIRE=1 makes this an error.")
        )
    print(f"\n{message}\n", file=sys.stderr, flush=True)


def compiler_fault() -> str | None:
    """Returns why the C++ compiler cannot compile a C++20 file; None if it can."""
    command = shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "c++"))
    if shutil.which(command[0]) is None:
        return f"no C++ compiler ({command[0]} is not found): install one, for example g++ or clang++, or set CXX"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <concepts>\nint main() { return std::integral<int> ? 0 : 1; }\n")
        built = subprocess.run(
            [*command, "-std=c++20", str(source), "-o", str(source.with_suffix(""))], capture_output=True, text=True
        )
    if built.returncode == 0:
        return None
    lines = (built.stderr or built.stdout).strip().splitlines() or ["it printed nothing"]
    return f"the C++ compiler {command[0]} fails on a C++20 program ({lines[0]}): repair it, or set CXX to another"


def cuda_home() -> str | None:
    """Returns the folder of the CUDA toolkit, which contains bin/nvcc; None without one."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders.append(str(Path(nvcc).resolve().parents[1]) if nvcc else None)
    return next((f for f in folders if f and (Path(f) / "bin" / "nvcc").exists()), None)


def architecture_flags() -> list[str]:
    """Returns nvcc's flags for the targets in TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;10.0+PTX"."""
    flags = []
    for entry in (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"prism_kernels: expected TORCH_CUDA_ARCH_LIST like 8.0;9.0a;10.0+PTX, got {entry!r}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension(name: str, folder: str, **options: object) -> Extension:
    """Returns an extension of all sources in a folder of csrc."""
    endings = (".cpp", ".cu")
    sources = sorted(str(p) for p in Path("csrc", folder).iterdir() if p.suffix in endings)
    headers = sorted(str(p) for p in Path("csrc").rglob("*.*h"))
    include = [*cpp.include_paths(), *(str(Path(p).resolve()) for p in ("csrc", "csrc/include"))]
    return Extension(
        name,
        sources,
        language="c++",
        depends=headers,
        include_dirs=include,
        library_dirs=cpp.library_paths(),
        **options,
    )


def extensions() -> list[Extension]:
    """Returns the extensions that can be built here."""
    if os.environ.get("PRISM_KERNELS_SKIP_BUILD") == "1":
        return []
    if cpp is None:
        skip("native code", "torch cannot be imported (an isolated build hides it): `pip install torch` first")
        return []
    fault = compiler_fault()
    if fault:
        skip("native code", fault)
        return []
    cxx = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden", ABI]
    # the running process has torch's libraries loaded, so that no path to them is recorded
    link = [] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
    sanitizer = os.environ.get("PRISM_KERNELS_SANITIZE")
    if sanitizer:
        # -O1: at -O3 the compiler may drop accesses that the sanitizer would report
        cxx += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}"]
        link += [f"-fsanitize={sanitizer}"]
    cpu = extension("prism_kernels._C", "cpu", extra_compile_args={"cxx": cxx}, extra_link_args=[*link, "-ltorch"])
    unwanted = os.environ.get("PRISM_KERNELS_CUDA") == "0" or sys.platform == "darwin"
    if unwanted or not list(Path("csrc/cuda").glob("*.cu")):
        return [cpu]
    home = cuda_home()
    if home is None:
        skip("CUDA code", "nvcc is not found: install the CUDA toolkit and set CUDA_HOME")
        return [cpu]
    # a CPU build of torch sets it to None
    cpp.CUDA_HOME = home
    nvcc = ["-O3", "-std=c++20", "-DUSE_CUDA", ABI, "--threads=2", *architecture_flags()]
    libraries = [*link, "-ltorch", f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    arguments = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
    return [cpu, extension("prism_kernels._C_cuda", "cuda", extra_compile_args=arguments, extra_link_args=libraries)]


EXTENSIONS = extensions()
COMMANDS = {}

if EXTENSIONS:

    class Build(cpp.BuildExtension.with_options(no_python_abi_suffix=True)):
        """Builds the extensions and leaves out one that fails."""

        def build_extensions(self) -> None:
            """Builds all extensions; without CUDA where torch rejects this toolkit or its host compiler."""
            try:
                super().build_extensions()
            except RuntimeError as error:
                if not any(e.name == "prism_kernels._C_cuda" for e in self.extensions):
                    raise
                # torch's error holds a format and its arguments separately
                text, *values = error.args
                skip("CUDA code", str(text).strip() % tuple(values) if values else str(text).strip())
                self.extensions = [e for e in self.extensions if e.name != "prism_kernels._C_cuda"]
                super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            """Builds one extension."""
            try:
                super().build_extension(ext)
            except Exception as error:
                skip(ext.name, f"its compilation failed ({type(error).__name__}; see the output of `pip install -v`)")

        def get_outputs(self) -> list[str]:
            """Returns the files that were built."""
            return [path for path in super().get_outputs() if Path(path).exists()]

        def copy_extensions_to_source(self) -> None:
            """Copies the built libraries beside the sources, for an editable installation."""
            folder = Path(self.build_lib)
            self.extensions = [e for e in self.extensions if (folder / self.get_ext_filename(e.name)).exists()]
            super().copy_extensions_to_source()

    COMMANDS["build_ext"] = Build

    class Wheel(bdist_wheel):
        """Tags the wheel for every Python 3, which the stable ABI allows."""

        def get_tag(self) -> tuple[str, str, str]:
            """Returns the wheel's tag: any platform if nothing was built."""
            built = self.get_finalized_command("build_ext").get_outputs()
            return "py3", "none", super().get_tag()[2] if built else "any"

    COMMANDS["bdist_wheel"] = Wheel

setup(ext_modules=EXTENSIONS, cmdclass=COMMANDS)
