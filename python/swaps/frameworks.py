"""Makes torchvision, MMDetection and Ultralytics importable where their compiled parts do not fit: a PyTorch without CUDA, mmcv-lite.

Call `use_torchvision()`, `use_mmdetection()` or `use_ultralytics()` before the first import of the framework. Where PyTorch has CUDA
or mmcv its compiled operators, nothing is put in their place.
"""
import ctypes
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import types

import torch

CUDA_LIBRARIES = ("libcudart.so", "libc10_cuda.so", "libtorch_cuda.so")


@functools.cache
def use_torchvision() -> None:
    """A torchvision built for CUDA asks for libraries of CUDA when it is loaded, but on a CPU for none of their functions: the
    run-time library only registers kernels, the others are never called. So empty ones of these names do."""
    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda or spec is None or spec.origin is None:
        return
    extension = pathlib.Path(spec.origin).parent / "_C.so"
    wanted = re.findall(r"\(NEEDED\).*\[(.+?)\]", run("readelf", "-d", "-W", extension))
    wanted = [name for name in wanted if name.startswith(CUDA_LIBRARIES)]
    if not wanted:
        return
    symbols = [line.split()[-1].split("@") for line in run("nm", "-D", "--undefined-only", extension).splitlines()]
    for library in wanted:
        # Symbols of the run-time library carry its name as their version; those of PyTorch's are told by theirs.
        of_runtime = sorted(name for name, *version in symbols if library in version)
        of_pytorch = sorted(name for name, *version in symbols if not version and re.search("3c104cuda|2at4cuda", name))
        functions = [f"long {name}(void) {{ return 0; }}" for name in of_runtime]
        if library.startswith("libc10_cuda"):
            functions += [f"void {name}(void) {{ __builtin_trap(); }}" for name in of_pytorch]
        load_library(library, "\n".join(functions), is_versioned=bool(of_runtime))


def load_library(name: str, source: str, is_versioned: bool) -> None:
    """Compiles C functions to a shared library of this name and loads it; nothing of it stays on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        code, library, versions = (pathlib.Path(folder) / file for file in ("stubs.c", name, "versions"))
        code.write_text(source + "\n")
        versions.write_text(f"{name} {{ global: *; }};\n")
        options = [f"-Wl,--version-script={versions}"] if is_versioned else []
        run(os.environ.get("CC", "cc"), "-w", "-shared", "-fPIC", code, "-o", library, f"-Wl,-soname,{name}", *options)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed, which stubs for CUDA's libraries need:\n{done.stderr}")
    return done.stdout


@functools.cache
def use_mmdetection() -> None:
    """mmcv-lite has no compiled operators: NMS and RoI align come from torchvision, any other raises when it is called."""
    use_torchvision()
    if importlib.util.find_spec("mmcv._ext") is None:
        module = Operators("mmcv._ext")
        module.__spec__ = importlib.util.spec_from_loader("mmcv._ext", None)
        sys.modules["mmcv._ext"] = module


class Operators(types.ModuleType):
    """What mmcv's Python calls, with its names and arguments."""

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        import torchvision

        if offset != 0:
            raise NotImplementedError(f"mmcv._ext.nms: offset must be 0 without mmcv's compiled operators, got {offset}")
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
        features, rois, output, argmax_y, argmax_x, *, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned
    ):
        import torchvision

        if pool_mode != 1:
            raise NotImplementedError("mmcv._ext.roi_align_forward: only averages without mmcv's compiled operators")
        size = (aligned_height, aligned_width)
        output.copy_(torchvision.ops.roi_align(features, rois, size, spatial_scale, sampling_ratio, aligned))

    @staticmethod
    def roi_align_backward(
        gradient, rois, argmax_y, argmax_x, result, *, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned
    ):
        shape = (spatial_scale, aligned_height, aligned_width, *result.shape, sampling_ratio, aligned)
        # Under autocast the gradient may have bfloat16, which this kernel does not know.
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        result.copy_(torch.ops.torchvision._roi_align_backward(gradient.to(dtype), rois.to(dtype), *shape))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*arguments, **options):
            raise NotImplementedError(f"mmcv._ext.{name}: needs mmcv's compiled operators, mmcv-lite has none")

        return missing


@functools.cache
def use_ultralytics() -> None:
    """Its settings go to a folder that vanishes with this process, not to the user's home, and it installs and downloads nothing."""
    use_torchvision()
    if "YOLO_CONFIG_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="ultralytics_")
        use_ultralytics.folder = folder  # lives as long as this function
        os.environ["YOLO_CONFIG_DIR"] = folder.name
    for switch, value in (("YOLO_OFFLINE", "true"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
        os.environ.setdefault(switch, value)
