"""Settings of the executor."""

from collections.abc import Callable
import dataclasses
from typing import TypeVar

from quire.config import ServiceConfig, setting
from quire.errors import ConfigError
from quire.units import parse_bytes, parse_size

_Size = TypeVar("_Size")


@dataclasses.dataclass(frozen=True, slots=True)
class ExecsvcConfig(ServiceConfig):
    """Runs a model on one device and offers its steps to gateways."""

    port: int = setting(50071, "Port to listen on; 0 lets the system choose.", minimum=0, maximum=65535)
    model: str = setting("smollm2", "GGUF file, Hugging Face directory, or smollm2 for the packaged one.")
    served_model_name: str | None = setting(None, "Name that requests use; none derives it from the model's path.")
    memsvc: str = setting("127.0.0.1:50061", "Where memsvc listens, host:port.")
    advertise: str | None = setting(None, "host:port where gateways and memsvc reach this; none: where it listens.")
    executor_id: str = setting("executor-0", "Name of this executor, stable over restarts, 1 .. 128 characters.")
    device: str = setting("auto", "Where to compute; auto is CUDA where there is one.", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "auto",
        "Element type to compute in; auto is bfloat16 on a CPU where the compiled step is fast (AVX2, NEON or better), "
        "else float32 there, and the model's own on CUDA.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    block_size: int = setting(16, "Tokens in a KV block: 16, 32 or 64.", minimum=16, maximum=64)
    kv_cache_bytes: str | None = setting(
        None,
        "Size of the KV cache, for example 512MiB, or on a CPU a share of the memory that is free, for example 25%; "
        "none: from the memory there.",
    )
    kv_cache_tokens: int | None = setting(None, "Size of the KV cache in tokens; goes before the bytes.", minimum=1)
    kv_cache_dtype: str = setting(
        "auto",
        "Element type of the KV cache; auto is the one computed in. fp8_e4m3 (GPU) and int8_per_token_head (CPU) hold "
        "twice the tokens.",
        choices=("auto", "fp8_e4m3", "int8_per_token_head"),
    )
    quantization: str = setting(
        "none",
        "Round the weights while they are loaded, on a CPU: int8 or int4, in groups of 32. What a GGUF file has in few "
        "bits stays as it is.",
        choices=("none", "int8", "int4"),
    )
    calculate_kv_scales: bool = setting(
        False,
        "With a float8 KV cache, divide each layer's keys and values by what the first prompt shows; else by the "
        "checkpoint's k_scale and v_scale, if it has any.",
    )
    swap_space: str | None = setting(
        None, "Host memory for blocks that are swapped out, for example 8GiB; none for no swap."
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of the device's memory for weights, activations and KV cache.", minimum=0.05, maximum=0.99
    )
    generation_config: str = setting(
        "auto",
        "Sampling parameters of requests that give none: auto is what the model brings, vllm is none, else a directory "
        "with a generation_config.json.",
    )
    override_generation_config: str | None = setting(
        None, "Parameters that go before those, as JSON, for example '{\"temperature\": 0.5}'."
    )
    load_format: str = setting(
        "auto", "auto reads the weights; dummy makes random ones of a config.json's shape.", choices=("auto", "dummy")
    )
    seed: int = setting(0, "Seed of dummy weights.", minimum=0, maximum=2**31 - 1)
    max_model_len: int | None = setting(None, "Longest sequence in tokens; none: the model's own.", minimum=1)
    max_num_seqs: int = setting(256, "Most sequences open at once.", minimum=1, maximum=65536)
    max_num_batched_tokens: int | None = setting(
        None, "Most tokens of one step; none: 512 on CPU, 8192 on CUDA.", minimum=1, maximum=1048576
    )
    attention_backend: str = setting(
        "auto",
        "What computes attention; auto is triton on CUDA, on a CPU native (the compiled step, bfloat16) or else torch.",
        choices=("auto", "native", "torch", "triton"),
    )
    enforce_eager: bool = setting(False, "Launch decode steps piece by piece on CUDA, without captured graphs.")
    batch_invariant: bool = setting(
        False,
        "On CUDA, share out attention so that a result does not depend on company, at some cost for few, long ones.",
    )
    disable_cascade_attn: bool = setting(
        False, "On CUDA, let each sequence read its own prefix, also where sequences share a long one."
    )
    num_threads: int | None = setting(
        None,
        "CPU threads of the model; none: one for each core with the compiled step, one less with torch.",
        minimum=1,
    )

    @property
    def kv_cache_size(self) -> int | float | None:
        """The KV cache's size, if it was set: bytes, or a share below 1; raises ConfigError if it is neither."""
        return None if self.kv_cache_bytes is None else _parsed("kv_cache_bytes", self.kv_cache_bytes, parse_size)

    @property
    def swap_byte_count(self) -> int:
        """The host memory for swapping in bytes; raises ConfigError if it is no size."""
        return 0 if self.swap_space is None else _parsed("swap_space", self.swap_space, parse_bytes)


def _parsed(field: str, text: str, parse: Callable[[str], _Size]) -> _Size:
    """Returns what `parse` reads; its ConfigError names the field."""
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error.message}", field=field) from error
