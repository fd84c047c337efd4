"""Models load from every format, and files that are damaged, refused or foreign say so in one line."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
from pathlib import Path
import struct

import gguf
import numpy as np
import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer
import torch

from execsvc.model import llama
from execsvc.model.config import from_hf
from execsvc.model.few_bits import quantise
from execsvc.model.gguf_file import GGUFFile
from execsvc.model.layers import inverse_frequencies
from execsvc.model.source import GGUFSource, open_model, packaged_model
from quire.errors import ModelFormatError, QuireError, UnsupportedError
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import CONFIG, Driver, start

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns query or key rows in GGUF's order, as llama.cpp's converter writes them."""
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path: Path) -> Path:
    """Writes the tiny random model as GGUF and returns the path."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_key_length(CONFIG.head_dim)
    writer.add_value_length(CONFIG.head_dim)
    writer.add_rope_freq_base(CONFIG.rope.theta)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [chr(0x100 + index) for index in range(CONFIG.vocab_size - 1)]
    writer.add_token_list([*tokens, tokens[0] + tokens[1]])
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    source = tiny.RandomSource()
    for name in tiny.tensor_names(CONFIG):
        tensor = source.load(name)
        for module, heads in (("q_proj", CONFIG.num_heads), ("k_proj", CONFIG.num_kv_heads)):
            if module in name:
                tensor = permuted(tensor, heads)
        short = name.removesuffix(".weight")
        if short.startswith("model.layers."):
            _, _, layer, module = short.split(".", 3)
            short = f"blk.{layer}.{GGUF_NAMES[module]}"
        else:
            short = GGUF_NAMES[short]
        writer.add_tensor(short + ".weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def first_logits(model: str) -> torch.Tensor:
    """Returns the logits of a model's first new token."""
    source = open_model(model)
    try:
        loaded = llama.load(source, torch.float32, torch.device("cpu"), 256)
    finally:
        source.close()
    driver = Driver(tiny.engine_of(loaded, blocks=8, max_model_len=256))
    driver.run({1: 20}, added=[start(1, [(7 * index) % 311 for index in range(20)], [1, 2])])
    return driver.logits[1][0]


def test_one_model_gives_the_same_logits_from_every_format(tmp_path: Path) -> None:
    """Otherwise the format of a download would decide what users read: GGUF permutes queries and keys."""
    single = first_logits(str(tiny.write_directory(tmp_path / "single")))
    assert torch.equal(single, first_logits(str(tiny.write_directory(tmp_path / "sharded", shards=3))))
    assert torch.equal(single, first_logits(str(write_gguf(tmp_path / "model.gguf"))))


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    """Otherwise the demo would need what the package imports."""
    source = open_model("smollm2")
    assert source.config.architecture == "LlamaForCausalLM"
    assert source.config.vocab_size == 49152
    assert source.config.tie_word_embeddings
    assert source.tokenizer.bos_token == "<|im_start|>"
    assert source.tokenizer.eos_token_ids == (2,)
    assert not source.tokenizer.add_bos_token
    assert "im_start" in source.tokenizer.chat_template
    tokenizer = Tokenizer.from_str(source.tokenizer.json)
    assert tokenizer.encode("<|im_start|>user\n19 ½").ids[:2] == [1, 4093]
    # The model's own tokenizer.json cuts out every numeric character: no token spans a blank and one.
    assert [len(tokenizer.decode([token]).strip()) <= 1 for token in tokenizer.encode("1984 ½").ids]
    source.close()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for damaged files."""
    return tmp_path_factory.mktemp("damaged")


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 1000, 0.02, 0.5, 0.999999])
def test_a_truncated_gguf_says_so(damaged: Path, keep: float) -> None:
    """Otherwise half a download would crash in a reshape, or answer with noise."""
    data = packaged_model().read_bytes()
    path = damaged / "cut.gguf"
    path.write_bytes(data[: int(keep if keep > 1 or keep == 0 else keep * len(data))])
    with pytest.raises(ModelFormatError, match=r"truncated|not a GGUF") as caught:
        open_model(str(path))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_safetensors_says_so(damaged: Path, keep: float) -> None:
    """Otherwise half a download would crash in the reader."""
    directory = tiny.write_directory(damaged / f"cut-{keep}")
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 or keep == 0 else keep * len(data))])
    with pytest.raises(ModelFormatError, match="truncated"):
        open_model(str(directory))


def rewrite_header(path: Path, name: str, **changes: object) -> None:
    """Changes the header's entry of one tensor."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name].update(changes)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [63]}, "do not hold"),
        ({"shape": [-1]}, "damaged"),
        ({"data_offsets": [4, 260]}, "overlap|do not hold"),
        ({"data_offsets": [0, 256]}, "overlap"),
        ({"dtype": "I8"}, "floats are supported"),
    ],
)
def test_a_damaged_header_says_so(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """Otherwise a damaged file would be read as other weights."""
    directory = tiny.write_directory(tmp_path)
    rewrite_header(directory / "model.safetensors", "model.norm.weight", **changes)
    with pytest.raises(QuireError, match=message):
        open_model(str(directory))


def test_pickles_are_refused(tmp_path: Path) -> None:
    """Otherwise a model from a stranger could run his code here."""
    directory = tiny.write_directory(tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelFormatError, match=r"pytorch_model.bin is a pickle"):
        open_model(str(directory))
    pickle = tmp_path / "model.pth"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFormatError, match="pickles are refused"):
        open_model(str(pickle))


def test_what_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    """Otherwise a mistyped path would be a stack trace."""
    with pytest.raises(ModelFormatError, match="no such file or directory"):
        open_model(str(tmp_path / "nothing"))
    with pytest.raises(ModelFormatError, match=r"config.json is missing"):
        open_model(str(tmp_path))
    directory = tiny.write_directory(tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"tokenizer.json is missing"):
        open_model(str(directory))
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelFormatError, match="not JSON"):
        open_model(str(directory))


def test_a_missing_shard_and_a_wrong_shape_say_so(tmp_path: Path) -> None:
    """Otherwise an incomplete download would fail somewhere in the middle."""
    directory = tiny.write_directory(tmp_path / "sharded", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFormatError, match="00002-of-00002"):
        open_model(str(directory))
    directory = tiny.write_directory(tmp_path / "shape")
    tensors = {name: tiny.RandomSource().load(name) for name in tiny.tensor_names(CONFIG)}
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"model.norm.weight.*\[65\].*\[64\]"):
        first_logits(str(directory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported are Llama"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64,
             "max_window_layers": 2},
            "sliding_window",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    """Otherwise a model would answer with silent nonsense."""
    with pytest.raises(UnsupportedError, match=message):
        from_hf({**tiny.hf_config(CONFIG), **changes}, "config.json")


@pytest.mark.parametrize("changes", [{"hidden_size": None}, {"num_attention_heads": "x"}, {"num_key_value_heads": 4}])
def test_a_config_that_makes_no_sense_says_so(changes: dict[str, object]) -> None:
    """Otherwise a broken config would be a stack trace."""
    with pytest.raises(ModelFormatError):
        from_hf({**tiny.hf_config(CONFIG), **changes}, "config.json")


def test_rope_settings_are_read_in_both_spellings() -> None:
    """Otherwise configs of newer or older transformers would run with the wrong frequencies."""
    base = tiny.hf_config(CONFIG)
    linear = {"rope_type": "linear", "factor": 2.0}
    old = from_hf({**base, "rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    new = from_hf({**base, "rope_theta": None, "rope_parameters": {**linear, "rope_theta": 10_000.0}}, "config.json")
    assert old.rope == new.rope
    plain = inverse_frequencies(CONFIG.rope, 32)
    assert torch.equal(inverse_frequencies(old.rope, 32), plain / 2)
    assert torch.equal(inverse_frequencies(CONFIG.rope, 32, torch.full((16,), 4.0)), plain / 4)
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 64}
    assert from_hf({**base, **mistral}, "config.json").sliding_window == 64
    assert dataclasses.replace(CONFIG, sliding_window=0).sliding_window == 0


def test_a_matrix_in_few_bits_stands_for_the_dequantised_one() -> None:
    """Otherwise the compiled step would compute another model than torch does from the same file."""
    source = open_model("smollm2")
    assert isinstance(source, GGUFSource)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.3.{part}.weight"
        matrix = source.load_quantised(name)
        assert matrix is not None
        assert torch.equal(matrix.dequantise(), source.load(name)), name
    source.close()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_off_by_half_a_step_at_most(bits: int) -> None:
    """A user who gives up bits must not lose more than these."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    weight[0], weight[1] = 0.0, 0.25  # nothing to scale by
    small = quantise(weight, bits)
    off = (small.dequantise() - weight).abs().view(8, 3, 32)
    # What is stored in halves is off by their precision besides.
    allowed = small.scales * 0.5001 + (
        0.0 if bits == 8 else 16 * 2.0**-11 * small.scales + 2.0**-11 * weight.abs().max()
    )
    assert torch.all(off <= allowed[..., None])
    assert torch.equal(small.dequantise()[:2], weight[:2].to(small.scales.dtype)) or bits == 8
    assert torch.all(small.dequantise()[0] == 0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_every_kind_of_few_bits_is_read_as_its_inventor_means_it(tmp_path: Path, kind: str) -> None:
    """Otherwise a file of that kind would be served as noise."""
    wanted = gguf.GGMLQuantizationType[kind]
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1)).numpy()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("few", gguf.quants.quantize(weight, wanted), raw_dtype=wanted)
    writer.add_tensor("many", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "model.gguf") as file:
        matrix = file.load_quantised("few")
        assert matrix is not None
        assert torch.equal(matrix.dequantise(), file.load("few"))
        assert file.load_quantised("many") is None


@pytest.mark.parametrize(("kind", "group"), [("Q4_K", 32), ("Q5_0", 32), ("Q6_K", 16), ("IQ4_NL", 32), ("IQ4_XS", 32)])
def test_any_block_is_read_as_its_inventor_means_it(tmp_path: Path, kind: str, group: int) -> None:
    """Files in Q4_K_M, which most people download, have several: any bits must mean what llama.cpp means by them."""
    wanted = gguf.GGMLQuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[wanted]
    data = np.random.default_rng(2).integers(0, 256, (32, 3, block_bytes), np.uint8)
    scales = np.random.default_rng(3).normal(0, 0.1, (32, 3, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        data[..., -2:] = scales[..., :2]
    else:  # a scale, and for Q4_K another one for offsets
        data[..., : 4 if kind == "Q4_K" else 2] = scales[..., : 4 if kind == "Q4_K" else 2]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("few", data.reshape(32, -1), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "model.gguf") as file:
        matrix = file.load_quantised("few")
        assert matrix is not None
        assert matrix.group == group
        assert torch.equal(matrix.dequantise(), file.load("few"))
