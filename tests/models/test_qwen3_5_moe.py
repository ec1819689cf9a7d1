"""The model against Hugging Face's, and against itself: prefill, decode and chunks are one computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertstream import LLM, CheckpointError
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.convert import convert
from expertstream.models.qwen3_5_moe import Config

from .. import oracle
from ..oracle import CONFIGS, config_of

# How far the native ops may be from float32 arithmetic, of the norm of the logits:
#   dense weights are multiplied in float32: only the order of sums differs, as between the reference and the oracle;
#   for quantized weights activations become int16, at most 2^-16 of a group's largest value each, and the errors of a few hundred
#   products in each of a few dozen matrices add up as a random walk: about 1e-4 for most tokens. Where two experts are all but
#   tied in the router, such an error can choose the other one; that token, and those after it through the state, then differ by
#   more. So the bound is for the median, and a looser one for four tokens in five;
#   bfloat16 keys and values are rounded to 2^-9 of their size each, which softmax and the residual stream attenuate.
DENSE, QUANTIZED, BF16_KV = 1e-4, 5e-4, 1e-2


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    config = config_of(**CONFIGS[request.param])
    model = oracle.make_oracle(config)
    return config, model, oracle.save_hf(tmp_path_factory.mktemp("hf"), config, model, torch.float32)


@pytest.mark.parametrize("ops", ["reference", "cpu"])
def test_float32_logits_and_greedy_tokens_equal_the_oracles(case: tuple[dict[str, Any], Any, Path], ops: str) -> None:
    config, model, folder = case
    tokens = oracle.random_tokens(config, 150)  # more than two chunks of the gated-delta form
    with LLM(folder, ops=ops, kv_dtype="f32", memory="64MiB", context_length=512) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(model, tokens)) < DENSE
        assert oracle.our_greedy(llm, tokens[:20], 64) == oracle.oracle_greedy(model, tokens[:20], 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    config = config_of(**CONFIGS["odd sizes"])
    model = oracle.make_oracle(config, dtype)
    folder = oracle.save_hf(tmp_path, config, model, dtype)
    tokens = oracle.random_tokens(config, 90)
    with LLM(folder, kv_dtype="f32", memory="64MiB", context_length=512) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(model, tokens)) < DENSE
        assert oracle.our_greedy(llm, tokens[:20], 64) == oracle.oracle_greedy(model, tokens[:20], 64)
    with LLM(folder, kv_dtype="bf16", memory="64MiB", context_length=512) as llm:
        error = oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(model, tokens))
        assert DENSE / 100 < error < BF16_KV


QUANTIZED_SIZES = {
    "hidden_size": 128, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192, "linear_value_head_dim": 32,
    "linear_key_head_dim": 32, "head_dim": 64,
}  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantized_checkpoints_equal_the_oracle_on_the_same_values(tmp_path: Path, bits: int, group_size: int) -> None:
    config = config_of(**QUANTIZED_SIZES)
    source = oracle.save_hf(tmp_path / "src", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    convert(source, tmp_path / "pack", BitPolicy(bits, group_size, 4 if bits == 4 else 8), threads=2)
    model = oracle.dequantized_oracle(tmp_path / "pack", config)
    tokens = oracle.random_tokens(config, 90)
    expected = oracle.oracle_logits(model, tokens)
    with LLM(tmp_path / "pack", ops="reference", kv_dtype="f32", memory="64MiB", context_length=512) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), expected) < DENSE
    with LLM(tmp_path / "pack", exact=True, kv_dtype="f32", memory="64MiB", context_length=512) as llm:
        errors = np.linalg.norm(oracle.our_logits(llm, tokens) - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(errors) < QUANTIZED / 2
        assert np.quantile(errors, 0.8) < QUANTIZED * 2
        assert oracle.our_greedy(llm, tokens[:20], 64) == oracle.oracle_greedy(model, tokens[:20], 64)


def test_8_bit_activations_change_little_and_exact_ones_less(tmp_path: Path) -> None:
    config = config_of(**QUANTIZED_SIZES)
    source = oracle.save_hf(tmp_path / "src", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    convert(source, tmp_path / "pack", BitPolicy(), threads=2)
    tokens = oracle.random_tokens(config, 90)
    logits = {}
    for exact in (False, True):
        with LLM(tmp_path / "pack", exact=exact, kv_dtype="f32", memory="64MiB", context_length=512) as llm:
            logits[exact] = oracle.our_logits(llm, tokens)
            assert ("16-bit" if exact else "8-bit") + " activations" in llm.describe()
    expected = oracle.oracle_logits(oracle.dequantized_oracle(tmp_path / "pack", config), tokens)
    error = {
        exact: float(np.median(np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)))
        for exact, got in logits.items()
    }
    assert error[True] < QUANTIZED / 2 and 10 * error[True] < error[False] < 0.1, error  # random routers flip easily


def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    from expertstream import _native

    config = config_of(**QUANTIZED_SIZES)
    source = oracle.save_hf(tmp_path / "src", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    convert(source, tmp_path / "pack", BitPolicy(), threads=2)
    tokens = oracle.random_tokens(config, 40)
    logits = []
    for isa in _native.available_isas():
        with LLM(tmp_path / "pack", isa=isa, memory="64MiB", context_length=512) as llm:
            logits.append(oracle.our_logits(llm, tokens))
    assert all(np.array_equal(logits[0], other) for other in logits[1:])


def test_prefill_decode_and_chunks_agree(tmp_path: Path) -> None:
    """300 tokens at once, in chunks of any size, and one by one: the logits after each, and the state they leave."""
    config = config_of()
    folder = oracle.save_hf(tmp_path, config, oracle.make_oracle(config), torch.float32)
    tokens = oracle.random_tokens(config, 300)
    with LLM(folder, memory="64MiB", context_length=512) as llm:
        expected = oracle.our_logits(llm, tokens)
        for chunk in (1, 2, 15, 16, 63, 64, 65, 128, 299):
            cache = llm.session().cache
            parts = [llm.model(tokens[at : at + chunk], cache, all_logits=True) for at in range(0, 300, chunk)]
            assert oracle.relative_error(np.concatenate(parts), expected) < 1e-5, chunk
            assert (np.concatenate(parts).argmax(-1) == expected.argmax(-1)).all()


def test_16k_tokens_in_chunks_and_token_by_token(tmp_path: Path) -> None:
    config = config_of(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=16)
    folder = oracle.save_hf(tmp_path, config, oracle.make_oracle(config), torch.float32)
    tokens = oracle.random_tokens(config, 16384)
    with LLM(folder, memory="256MiB", context_length=16640, kv_dtype="f32") as llm:
        ends = []
        for chunk in (2048, 777):
            cache = llm.session().cache
            for at in range(0, 16384, chunk):
                logits = llm.model(tokens[at : at + chunk], cache)
            ends.append((logits[0], cache))
        cache = llm.session().cache
        for token in tokens:
            logits = llm.model(np.array([token]), cache)
        ends.append((logits[0], cache))
        for logits, cache in ends:
            assert cache.position == 16384
            assert oracle.relative_error(logits, ends[0][0]) < 1e-4
        # All three go on with the same text.
        texts = []
        for logits, cache in ends:
            text = [int(logits.argmax())]
            for _ in range(31):
                text.append(int(llm.model(np.array(text[-1:]), cache)[0].argmax()))
            texts.append(text)
        assert texts[0] == texts[1] == texts[2]
    assert oracle.relative_error(ends[0][0], oracle.oracle_logits(oracle.make_oracle(config), tokens)[-1]) < 1e-3


@pytest.mark.parametrize("count", [64, 65, 70, 129, 140, 200])
def test_how_a_prompt_is_cut_never_changes_a_bit(hf_folder: Path, count: int) -> None:
    """The chunk follows from the memory budget; so it must not show, not even by rounding."""
    from expertstream.generate import prefill

    from ..conftest import SMALL

    tokens, results = oracle.random_tokens(SMALL, count), []
    for chunk in (64, 128, 2048):
        with LLM(hf_folder, memory="64MiB", context_length=256) as llm:
            cache = llm.session().cache
            results.append((prefill(llm.model, cache, tokens, chunk), llm.model(tokens[:1], cache)))
    for logits, following in results[1:]:
        assert np.array_equal(logits, results[0][0]) and np.array_equal(following, results[0][1])


def test_the_rotary_default_is_the_architectures() -> None:
    config = config_of(rope_parameters={"rope_theta": 1e4})
    assert Config.from_json(config, "here").rotary.dims == config["head_dim"] // 4


def test_fewer_experts_change_the_result_and_are_named(tmp_path: Path) -> None:
    config = config_of(num_experts_per_tok=4)
    folder = oracle.save_hf(tmp_path, config, oracle.make_oracle(config), torch.float32)
    fewer = oracle.make_oracle(config)
    for layer in fewer.model.layers:
        layer.mlp.gate.top_k = 2
    tokens = oracle.random_tokens(config, 50)
    with LLM(folder, experts_per_token=2, kv_dtype="f32", memory="64MiB", context_length=512) as llm:
        assert llm.lossy == "2 of 4 experts per token"
        assert oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(fewer, tokens)) < DENSE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be an integer from 1 to 2"),
        ({"hidden_size": -4}, "hidden_size must be an integer from 1 to 2"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types must name"),
        ({"layer_types": ["other"] * 4}, "layer_types must name"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": ["x"]}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta must be"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": -0.25}}, "partial_rotary_factor must be"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": float("nan")}},
            "partial_rotary_factor must be",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be greater than 0"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps must be greater than 0"),
        ({"vocab_size": 10**15}, "vocab_size must be an integer from 1 to 2"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"layer_types": [["x"]] * 4}, "layer_types must name"),
        ({"text_config": None}, "text_config must be an object"),
        ({"text_config": []}, "text_config must be an object"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Config.from_json(config_of(**change), "somewhere")


def test_layer_types_follow_from_the_interval() -> None:
    config = config_of(num_hidden_layers=8, full_attention_interval=4)
    del config["layer_types"]
    kinds = Config.from_json(config, "here").layer_types
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [3, 7]
