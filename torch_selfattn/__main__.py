"""``python -m torch_selfattn``: what is installed here, and which implementation runs what."""

import platform
from collections.abc import Iterator

import torch

import torch_selfattn
from torch_selfattn import _C

# The problem that explain() is asked about.
_HEAD_DIM = 64
_LENGTH = 256


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    """Of the sets that kernels may be written for, those this processor has."""
    try:
        with open("/proc/cpuinfo") as info:
            flags = next(
                (line.split() for line in info if line.startswith(("flags", "Features"))), []
            )
    except OSError:
        return []
    known = (
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile",
        "amx_bf16", "asimd", "asimdhp", "sve", "bf16",
    )  # fmt: skip
    return [name for name in known if name in flags]


def _environment() -> Iterator[str]:
    yield f"torch_selfattn  {torch_selfattn.__version__} in {torch_selfattn.__path__[0]}"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield f"torch           {torch.__version__} ({cuda}); built for {_C.torch_version}"
    yield f"Python          {platform.python_version()} on {platform.platform()}"
    yield (
        f"CPU             {_cpu_name()}, {torch.get_num_threads()} threads, "
        f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    )
    yield f"instructions    {' '.join(_instruction_sets()) or 'unknown'}"
    if _C.cuda:
        yield f"CUDA kernels    built for {_C.cuda_archs}"
    else:
        yield "CUDA kernels    not built"
    if not torch.cuda.is_available():
        yield "GPU             none that torch can use"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield (
            f"GPU {index}           {device.name}, sm_{device.major}{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
    forced = _C.forced_implementation()
    if forced:
        yield f"forced          {forced}"


def _implementations(device: str, dtype: torch.dtype, score: str) -> str:
    q = torch.zeros(1, 1, _LENGTH, _HEAD_DIM, device=device, dtype=dtype)
    weight = q.new_zeros(_HEAD_DIM) if score == "additive" else None
    try:
        return torch_selfattn.explain(q, q, q, weight)
    except (NotImplementedError, RuntimeError) as error:
        return f"not available: {str(error).splitlines()[0]}"


def main() -> None:
    print("\n".join(_environment()))
    print(f"\nImplementations (head dim {_HEAD_DIM}, {_LENGTH} keys, no mask), best first:")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for device in devices:
        for score in ("dot", "additive"):
            # One paragraph for all dtypes that get the same answer.
            answers: dict[str, list[str]] = {}
            for dtype in dtypes:
                name = str(dtype).removeprefix("torch.")
                answers.setdefault(_implementations(device, dtype, score), []).append(name)
            for answer, names in answers.items():
                print(f"\n{', '.join(names)}\n{answer}")


if __name__ == "__main__":
    main()
