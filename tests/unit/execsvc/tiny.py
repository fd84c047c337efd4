"""Tiny random models, engines on them, and plans in one line each."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
import torch

from execsvc import attention
from execsvc.engine import Engine
from execsvc.gpu.decoder import Decoder
from execsvc.gpu.operations import TorchOperations, TritonOperations
from execsvc.gpu.runtime import EagerRuntime, Runtime
from execsvc.gpu.sampling import DeviceSampler, TorchSampler, TritonSampler
from execsvc.gpu.steps import GpuSteps
from execsvc.kv_cache import KVCache
from execsvc.model import llama
from execsvc.model.config import ModelConfig, RopeConfig
from execsvc.model.dummy import shape_of
from execsvc.model.source import open_model
from execsvc.prefix_tree import GroupRules
from execsvc.runner import Runner
from kernels.layout import KVLayout
from kernels.paged_attention.group_columns import GroupColumns
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=192,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10_000.0),
    tie_word_embeddings=False,
)


class RandomSource:
    """Random weights of a configuration, the same for the same seed."""

    def __init__(self, config: ModelConfig = CONFIG, seed: int = 0) -> None:
        self.path = Path("random")
        self.name = "tiny"
        self.config = config
        self._seed = seed

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor that depends on its name and the seed."""
        generator = torch.Generator().manual_seed(self._seed + sum(map(ord, name)) * 7919)
        tensor = torch.randn(shape_of(self.config, name), generator=generator)
        if "norm" in name:
            return 1.0 + 0.1 * tensor
        return tensor * (0.5 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5 * 2)

    def find(self, name: str) -> None:
        """There is nothing that a model could do without."""

    def rope_factors(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Does nothing."""


def tensor_names(config: ModelConfig) -> list[str]:
    """Returns the names of all tensors of a model."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_word_embeddings:
        names.append("lm_head.weight")
    modules = ["input_layernorm", "post_attention_layernorm"]
    modules += [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    if config.qk_norm:
        modules += ["self_attn.q_norm", "self_attn.k_norm"]
    for layer in range(config.num_layers):
        names += [f"model.layers.{layer}.{module}.weight" for module in modules]
        if config.qkv_bias:
            names += [f"model.layers.{layer}.self_attn.{name}_proj.bias" for name in "qkv"]
    return names


def hf_config(config: ModelConfig) -> dict[str, object]:
    """Returns the config.json of a configuration."""
    return {
        "architectures": [config.architecture],
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": 2,
    }


def write_directory(directory: Path, config: ModelConfig = CONFIG, shards: int = 1) -> Path:
    """Writes a Hugging Face directory with random weights and a tokenizer of bytes; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    source = RandomSource(config)
    names = tensor_names(config)
    if shards == 1:
        save_file({name: source.load(name) for name in names}, directory / "model.safetensors")
    else:
        files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
        weight_map = {name: files[index % shards] for index, name in enumerate(names)}
        for file in files:
            save_file({name: source.load(name) for name in names if weight_map[name] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def smollm2() -> llama.Llama:
    """Returns the packaged model in float32, for sequences of up to 2048 tokens."""
    source = open_model("smollm2")
    try:
        return llama.load(source, torch.float32, torch.device("cpu"), 2048)
    finally:
        source.close()


def engine_of(
    model: llama.Llama | ModelConfig = CONFIG,
    *,
    blocks: int = 400,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 4096,
    max_model_len: int = 1024,
    swap_slots: int = 0,
) -> Engine:
    """Returns an engine in epoch 1."""
    cpu = torch.device("cpu")
    if isinstance(model, ModelConfig):
        model = llama.load(RandomSource(model), dtype, cpu, max_model_len)
    config = model.config
    layout = KVLayout(blocks, config.num_layers, config.num_kv_heads, block_size, config.head_dim, dtype)
    cache = KVCache(layout, cpu)
    runner = Runner(model, attention.create(backend, cache, config.sliding_window), cache)
    engine = Engine(
        runner,
        cache,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        swap_slot_count=swap_slots,
    )
    engine.begin_epoch(1)
    return engine


@dataclasses.dataclass(slots=True)
class Driver:
    """Plans one after the other, logits kept by table."""

    engine: Engine
    step: int = 0
    tokens: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    logits: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine.observe_logits = self._observe

    def _observe(self, tables: list[int], logits: torch.Tensor) -> None:
        for row, table in enumerate(tables):
            self.logits.setdefault(table, []).append(logits[row].clone())

    def run(
        self,
        scheduled: dict[int, int] | None = None,
        *,
        added: Sequence[pb.SequenceStart] = (),
        removed: Sequence[int] = (),
        appended: Sequence[int] = (),
        copies: Sequence[int] = (),
        swap_out: Sequence[int] = (),
        swap_in: Sequence[int] = (),
        swap_freed: Sequence[int] = (),
        owner: int = 0,
        epoch: int = 1,
    ) -> pb.StepResult:
        """Applies one plan and returns its result."""
        self.step += 1
        scheduled = scheduled or {}
        plan = pb.StepPlan(
            step=self.step,
            epoch=epoch,
            added=added,
            removed=columns.pack(removed),
            appended=columns.pack(appended),
            copies=columns.pack(copies),
            swap_out=columns.pack(swap_out),
            swap_in=columns.pack(swap_in),
            swap_freed=columns.pack(swap_freed),
            scheduled_tables=columns.pack(scheduled.keys()),
            scheduled_counts=columns.pack(scheduled.values()),
        )
        result = self.engine.apply(plan, owner)
        for table, token in zip(
            columns.unpack_list(result.sampled_tables, ""), columns.unpack_list(result.sampled_tokens, ""), strict=True
        ):
            self.tokens.setdefault(table, []).append(token)
        return result


def start(
    table: int,
    tokens: Sequence[int],
    blocks: Sequence[int],
    computed: int = 0,
    sibling_seeds: Sequence[int] = (),
    **sampling: float,
) -> pb.SequenceStart:
    """Returns the start of a sequence."""
    return pb.SequenceStart(
        table=table,
        token_ids=columns.pack(tokens),
        block_ids=columns.pack(blocks),
        computed_token_count=computed,
        sibling_seeds=sibling_seeds,
        sampling=pb.SamplingParams(top_p=sampling.pop("top_p", 1.0), **sampling),  # type: ignore[arg-type]
    )


def gpu_engine_of(
    model: llama.Llama | ModelConfig = CONFIG,
    *,
    blocks: int = 400,
    block_size: int = 16,
    operations: str = "torch",
    runtime: Runtime | None = None,
    sizes: list[int] | None = None,
    kv_dtype: torch.dtype = torch.float32,
    swap_slots: int = 0,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 256,
    max_model_len: int = 256,
    batch_invariant: bool = False,
    group_rules: GroupRules | None = None,
) -> Engine:
    """Returns an engine in epoch 1 that works as on a GPU, on CPU tensors; in groups if there are rules for them."""
    runtime = EagerRuntime() if runtime is None else runtime
    if isinstance(model, ModelConfig):
        model = llama.load(RandomSource(model), torch.float32, runtime.device, max_model_len)
    config = model.config
    layout = KVLayout(blocks, config.num_layers, config.num_kv_heads, block_size, config.head_dim, kv_dtype)
    cache = KVCache(layout, runtime.device)
    common = (cache, model.rotary, config.num_heads, config.sliding_window)
    if operations == "triton":
        invariant_len = max_model_len if batch_invariant else 0
        chosen = TritonOperations(*common, max_num_seqs, invariant_len)
    elif group_rules is None:
        chosen = TorchOperations(*common)
    else:
        chosen = TorchOperations(*common, GroupColumns.allocate(3, max_num_seqs, runtime.device), group_rules)
    limits = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    sampler: DeviceSampler = TorchSampler()
    if operations == "triton":
        sampler = TritonSampler(max_num_seqs, config.vocab_size, runtime.device)
    steps = GpuSteps(Decoder(model, chosen), cache, sampler, runtime, **limits)
    steps.capture(sizes)
    engine = Engine(steps, cache, swap_slot_count=swap_slots, **limits)
    engine.begin_epoch(1)
    return engine
