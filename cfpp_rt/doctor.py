"""`cfpp doctor`: what is here, which backend runs each op and why, and the command that adds what is missing."""

import argparse
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

EXTRAS = {
    "wan": ("diffusers", "transformers", "sentencepiece", "ftfy", "av", "PIL", "tqdm"),
    "bench": ("matplotlib", "psutil"),
}
_DISTRIBUTION = {"PIL": "pillow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults()


def run(arguments: argparse.Namespace) -> None:
    import torch

    from cfpp_rt.ops import backends

    print(f"cfpp-rt  {version('cfpp-rt')}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch    {torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}")
    print("devices")
    print("  cpu")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"  cuda:{index}  {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    print("ops")
    for op, rows in backends().items():
        for device, (backend, reason) in rows.items():
            print(f"  {op:<12} {device:<5} {backend:<10} {reason}")
    print("extras")
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        found = ", ".join(f"{name} {_version(name)}" for name in modules if name not in missing)
        print(f"  {extra:<6} {found or 'nothing'}")
        if missing:
            print(f"         missing {', '.join(missing)}: pip install 'cfpp-rt[{extra}]'")


def _version(module: str) -> str:
    try:
        return version(_DISTRIBUTION.get(module, module))
    except PackageNotFoundError:
        return "?"
