"""What an adapter says where its framework is not installed."""
import importlib


def check_installed(extra: str, *packages: str) -> None:
    """Imports the packages. Raises ModuleNotFoundError naming the extra of this library that brings what is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            of_extra = f'rsloss_kernels.integrations.{extra} needs {package}: pip install "rsloss_kernels[{extra}]"'
            if extra == "mmdet":
                of_extra += ", and mmcv or mmcv-lite of a version that fits your torch"
            raise ModuleNotFoundError(f"{of_extra} ({error})", name=error.name) from error
