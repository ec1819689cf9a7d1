"""Each other architecture against Hugging Face's, and against itself. What holds for all is here; what is one's own is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertstream import LLM, CheckpointError
from expertstream.batch import Batch
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.checkpoint.reader import open_checkpoint
from expertstream.convert import convert
from expertstream.kv_cache import WindowState
from expertstream.layers.weights import LoadedWeights
from expertstream.models import build, config_of, expert_layouts, read_config, scratch_bytes, supported_models

from .. import oracle
from ..tape import Tape

_COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
    "eos_token_id": 0,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    **_COMMON, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "attention_bias": False, "mlp_only_layers": [],
}  # fmt: skip
NEXT: dict[str, Any] = {
    **_COMMON, "model_type": "qwen3_next", "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "norm_topk_prob": True, "attention_bias": False, "mlp_only_layers": [],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 128,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **_COMMON, "model_type": "gpt_oss", "num_local_experts": 8, "intermediate_size": 64, "sliding_window": 24, "swiglu_limit": 2.0,
    "rope_parameters": YARN, "attention_bias": True,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN3,
    "qwen3_moe, odd": {
        **QWEN3, "hidden_size": 72, "head_dim": 22, "moe_intermediate_size": 40, "vocab_size": 301, "num_attention_heads": 6,
        "num_key_value_heads": 3, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False, "attention_bias": True,
        "tie_word_embeddings": True, "num_hidden_layers": 2,
    },
    "qwen3_moe, yarn": {
        **QWEN3, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3_next": NEXT,
    "qwen3_next, yarn": {
        **NEXT, "head_dim": 64, "rope_parameters": {
            **NEXT["rope_parameters"], "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32, "mscale": 0.7,
            "mscale_all_dim": 1.2, "beta_fast": 16.0,
        },
    },
    "qwen3_next, odd": {
        **NEXT, "hidden_size": 72, "head_dim": 24, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "vocab_size": 301,
        "linear_key_head_dim": 24, "linear_value_head_dim": 40, "linear_num_key_heads": 3, "linear_num_value_heads": 6,
        "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 7, "num_experts_per_tok": 3, "linear_conv_kernel_dim": 3,
        "full_attention_interval": 2,
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss, odd": {
        **GPT_OSS, "hidden_size": 96, "head_dim": 18, "intermediate_size": 32, "vocab_size": 301, "num_attention_heads": 6,
        "num_key_value_heads": 3, "num_local_experts": 7, "num_experts_per_tok": 3, "sliding_window": 65, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {**YARN, "truncate": True, "factor": 4.0, "original_max_position_embeddings": 1024},
    },
}  # fmt: skip
SIMPLE = ("qwen3_moe", "qwen3_next", "gpt_oss")
DENSE, QUANTIZED = 1e-4, 5e-4  # as in test_qwen3_5_moe.py


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case's config, its oracle and its checkpoint, made once."""
    known: dict[str, Any] = {}

    def make(name: str) -> tuple[dict[str, Any], Any, Path]:
        if name not in known:
            config = CASES[name]
            # A dense trunk in float32; gpt-oss's experts are MXFP4 as they are released.
            model = oracle.make_oracle(config)
            folder = tmp_path_factory.mktemp(name.replace(", ", "-"))
            known[name] = config, model, oracle.save_hf(folder, config, model, torch.float32)
        return known[name]  # type: ignore[no-any-return]

    return make


def test_every_architecture_is_tried() -> None:
    assert {c["model_type"] for c in CASES.values()} | {"qwen3_5_moe"} == set(supported_models())


@pytest.mark.parametrize("name", CASES)
def test_float32_logits_and_greedy_tokens_equal_the_oracles(made: Any, name: str) -> None:
    config, model, folder = made(name)
    tokens = oracle.random_tokens(config, 150)
    expected = oracle.oracle_logits(model, tokens)
    options: dict[str, Any] = {"kv_dtype": "f32", "memory": "64MiB", "context_length": 512}
    with LLM(folder, ops="reference", **options) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), expected) < DENSE
        assert oracle.our_greedy(llm, tokens[:20], 64) == oracle.oracle_greedy(model, tokens[:20], 64)
    with LLM(folder, exact=True, **options) as llm:
        got = oracle.our_logits(llm, tokens)
        if config["model_type"] != "gpt_oss":  # nothing is quantized, so nothing is rounded
            assert oracle.relative_error(got, expected) < DENSE
            assert oracle.our_greedy(llm, tokens[:20], 64) == oracle.oracle_greedy(model, tokens[:20], 64)
        errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(errors) < QUANTIZED / 2 and np.quantile(errors, 0.8) < QUANTIZED * 2


@pytest.mark.parametrize("name", SIMPLE)
def test_a_pack_stands_for_the_same_values_as_the_oracle(made: Any, name: str, tmp_path: Path) -> None:
    config, _, folder = made(name)
    convert(folder, tmp_path / "pack", BitPolicy(4, 32, 8), threads=2)
    tokens = oracle.random_tokens(config, 90)
    expected = oracle.oracle_logits(oracle.dequantized_oracle(tmp_path / "pack", config), tokens)
    options: dict[str, Any] = {"kv_dtype": "f32", "memory": "64MiB", "context_length": 512}
    with LLM(tmp_path / "pack", ops="reference", **options) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), expected) < DENSE
    with LLM(tmp_path / "pack", exact=True, **options) as llm:
        got = oracle.our_logits(llm, tokens)
        errors = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(errors) < QUANTIZED / 2 and np.quantile(errors, 0.8) < QUANTIZED * 4


def test_gpt_oss_experts_keep_their_blocks_in_a_pack(made: Any, tmp_path: Path) -> None:
    """Bit for bit: what the release stores is what kernels read, whichever policy the trunk is quantized with."""
    _, _, folder = made("gpt_oss, odd")
    convert(folder, tmp_path / "pack", BitPolicy(4, 32, 16), threads=2)
    tokens = oracle.random_tokens(CASES["gpt_oss, odd"], 40)
    logits = []
    for path in (folder, tmp_path / "pack"):
        with LLM(path, memory="64MiB", context_length=512) as llm:
            logits.append(oracle.our_logits(llm, tokens))
    assert np.array_equal(*logits)
    checkpoint = open_checkpoint(tmp_path / "pack")
    assert {str(m) for layout in expert_layouts(config_of(checkpoint), checkpoint) for m in layout.format.matrices} == {
        "MXFP4"
    }


@pytest.mark.parametrize("name", SIMPLE)
def test_where_experts_lie_and_how_a_prompt_is_cut_never_changes_a_bit(made: Any, name: str) -> None:
    config, _, folder = made(name)
    tokens, results = oracle.random_tokens(config, 1400), []
    from expertstream.generate import prefill

    with LLM(folder, memory="64MiB", context_length=2048) as llm:
        most = llm.plan
    least = most.trunk_bytes + most.state_bytes + 2 * most.slot_bytes + (6 << 20)
    for memory, chunk, residency in ((64 << 20, 2048, "slots"), (least, 64, "slots"), (64 << 20, 320, "os")):
        with LLM(folder, memory=memory, context_length=2048, residency=residency, reader="pread") as llm:
            cache = llm.session().cache
            rows = [prefill(llm.model, cache, tokens, chunk)]
            rows += [llm.model(tokens[i : i + 1], cache)[0] for i in range(3)]
            results.append(np.stack([row.reshape(-1) for row in rows]))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", SIMPLE)
def test_prefill_decode_and_chunks_agree(made: Any, name: str) -> None:
    config, _, folder = made(name)
    tokens = oracle.random_tokens(config, 300)
    with LLM(folder, memory="64MiB", context_length=512, kv_dtype="f32") as llm:
        expected = oracle.our_logits(llm, tokens)
        for chunk in (1, 15, 64, 65, 299):
            cache = llm.session().cache
            parts = [llm.model(tokens[at : at + chunk], cache, all_logits=True) for at in range(0, 300, chunk)]
            assert oracle.relative_error(np.concatenate(parts), expected) < 1e-5, chunk


@pytest.mark.parametrize("name", SIMPLE)
def test_sequences_in_a_batch_have_the_bits_of_each_alone(made: Any, name: str) -> None:
    """With few experts in memory, and sequences of different lengths."""
    config, _, folder = made(name)
    prompts = [oracle.random_tokens(config, n, seed=n) for n in (5, 70, 190)]
    with LLM(folder, memory="64MiB", context_length=256) as llm:
        plan = llm.plan
    memory = plan.trunk_bytes + plan.state_bytes + plan.scratch_bytes + 6 * plan.slot_bytes
    with LLM(folder, memory=memory, context_length=256, residency="slots") as llm:

        def begun() -> list[Any]:
            caches = [llm.session().cache for _ in prompts]
            for prompt, cache in zip(prompts, caches, strict=True):
                llm.model(prompt, cache, prompt=True)
            return caches

        alone, together = begun(), begun()
        for step in range(4):
            tokens = oracle.random_tokens(config, len(prompts), seed=step)
            rows = llm.model.forward(Batch(tokens, together))
            for i, cache in enumerate(alone):
                assert np.array_equal(llm.model(tokens[i : i + 1], cache)[0], rows[i]), (step, i)


@pytest.mark.parametrize("name", [*SIMPLE, "qwen3_5_moe"])
def test_a_decode_step_can_be_recorded_once_and_replayed(made: Any, hf_folder: Path, name: str) -> None:
    """From the model's own file, on other tokens, positions and sequences, bit for bit: neither positions nor routing pass through it."""
    folder = hf_folder if name == "qwen3_5_moe" else made(name)[2]
    with LLM(folder, memory="64MiB", context_length=256) as llm:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(1, llm.model_config.vocab_size, n) for n in (3, 70, 130, 12)]

        def begun() -> list[Any]:
            caches = [llm.session().cache for _ in prompts]
            for prompt, cache in zip(prompts, caches, strict=True):
                llm.model(prompt, cache, prompt=True)
            return caches

        expected, replayed = begun(), begun()
        for sequences in (1, 2):
            tape = Tape(llm.ops, llm.model.experts)
            recorded: Any = tape
            model = build(llm.model_config, LoadedWeights(llm.checkpoint, recorded), recorded, llm.top_k)
            tape.record_pass(model, Batch(prompts[0][:sequences], replayed[:sequences]))
            for first in range(0, len(prompts), sequences):
                which = slice(first, first + sequences)
                for _ in range(3):
                    tokens = rng.integers(1, llm.model_config.vocab_size, sequences)
                    logits = llm.model.forward(Batch(tokens, expected[which]))
                    assert np.array_equal(tape.replay(Batch(tokens, replayed[which])), logits), (sequences, first)


@pytest.mark.parametrize("name", SIMPLE)
def test_prefixes_and_sessions_are_resumed_bit_for_bit(made: Any, name: str, tmp_path: Path) -> None:
    config, _, folder = made(name)
    tokens = oracle.random_tokens(config, 700)

    def answer(session: Any, prompt: np.ndarray) -> list[Any]:
        params = session.llm.sampling_params(temperature=0, max_tokens=6, logprobs=0)
        return [(r.token, r.logprob and r.logprob.logprob) for r in session.generate(prompt, params)]

    options: dict[str, Any] = {"memory": "64MiB", "context_length": 1024}
    with LLM(folder, **options) as llm:
        session = llm.session()
        expected = answer(session, tokens)
        session.save(tmp_path / "state")
        following = answer(session, tokens[:50])
        loaded = llm.session()
        loaded.load(tmp_path / "state")
        assert answer(loaded, tokens[:50]) == following
    for disk in (0, 32 << 20):
        with LLM(folder, prefix_cache_bytes=8 << 20, **options) as llm:
            if disk:
                llm.keep_prefixes(tmp_path / "prefixes", disk)
            assert answer(llm.session(), tokens) == expected
            assert answer(llm.session(), tokens) == expected
            assert llm.prefixes is not None and llm.prefixes.tokens_reused >= 640
            llm.prefixes.flush()
    with LLM(folder, prefix_cache_bytes=8 << 20, **options) as llm:
        llm.keep_prefixes(tmp_path / "prefixes", 32 << 20)
        assert answer(llm.session(), tokens) == expected
        assert llm.prefixes is not None and llm.prefixes.tokens_reused >= 640


def test_a_window_drops_what_it_does_not_see(made: Any) -> None:
    config, _, folder = made("gpt_oss")
    with LLM(folder, memory="64MiB", context_length=4096) as llm:
        window, full = (state.arrays[0].shape[1] for state in llm.session().cache.layers[:2])
        assert window < 1200 and full == 4096
        cache = llm.session().cache
        llm.model(oracle.random_tokens(config, 3000), cache, prompt=True)
        state = cache.layers[0]
        assert isinstance(state, WindowState) and 3000 - state.first <= window and state.first % 64 == 0


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_a_windows_snapshot_is_what_was_there(kv_dtype: str) -> None:
    from expertstream.kv_cache import AttentionSpec

    rng = np.random.default_rng(0)
    for window, count in ((24, 10), (24, 500), (130, 1900)):
        state = AttentionSpec(2, 8, window).make(4096, kv_dtype)
        assert isinstance(state, WindowState)
        position = 0
        while position < count:
            step = state.reserve(position, min(700, count - position))
            for rows in state.arrays:
                begin = position - state.first
                rows[:, begin : begin + step] = rng.integers(1, 100, rows[:, begin : begin + step].shape)
            position += step
        copies = state.copies(count)
        other = AttentionSpec(2, 8, window).make(4096, kv_dtype)
        assert isinstance(other, WindowState)
        other.restore(count, copies)
        assert [(a.dtype.name, a.shape) for a in copies] == state.shapes()
        for mine, theirs, copy in zip(state.arrays, other.arrays, copies, strict=True):
            last = min(window, count)
            assert np.array_equal(
                mine[:, count - last - state.first : count - state.first],
                theirs[:, count - last - other.first : count - other.first],
            )
            assert np.array_equal(copy[:, window - last :], mine[:, count - last - state.first : count - state.first])
            assert not copy[:, : window - last].any()


@pytest.mark.parametrize("name", [*SIMPLE, "gpt_oss, odd", "qwen3_5_moe"])
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_scratch_is_what_activations_take_at_most(made: Any, hf_folder: Path, name: str, tokens: int) -> None:
    """The arrays that Python holds and the buffers of the engine, measured, against what the shapes say."""
    import tracemalloc

    folder = hf_folder if name == "qwen3_5_moe" else made(name)[2]
    config = config_of(open_checkpoint(folder))
    ids = np.random.default_rng(0).integers(1, config.vocab_size, 1024)
    with LLM(folder, memory="64MiB", context_length=1024, threads=2) as llm:
        cache = llm.session().cache
        if tokens < 1024:  # its last tokens, so that attention has its longest past
            llm.model(ids[: 1024 - tokens], llm.session().cache)
            cache.position = 1024 - tokens
        ops: Any = llm.ops
        project = ops.project
        ops.project = lambda x, weights: [y.copy() for y in project(x, weights)]  # theirs are not traced
        ops.engine.release_buffers()
        tracemalloc.start()
        llm.model(ids[:tokens], cache, prompt=True)
        measured = tracemalloc.get_traced_memory()[1] + ops.engine.buffer_bytes
        tracemalloc.stop()
    bound = scratch_bytes(config, tokens, 1024, 2)
    assert measured <= bound + (64 << 10)  # small objects
    assert tokens < 64 or bound < 2 * measured


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; only \[\] is supported"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"head_dim": 31}, "head_dim makes 31 of 31 dimensions rotate; their number must be even"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("gpt_oss", {"sliding_window": 0}, "sliding_window must be"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 4}, "layer_types must name sliding_attention or full_attention"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type must be default or yarn; got 'linear'"),
        ("gpt_oss", {"rope_parameters": {**YARN, "factor": 0}}, "factor must be greater"),
        ("gpt_oss", {"rope_parameters": {**YARN, "beta_slow": 64}}, r"beta_slow \(64\) must be at most beta_fast"),
        ("gpt_oss", {"num_local_experts": 1}, "must be at most num_local_experts"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config({**CASES[name], **change}, "somewhere")


def test_older_configs_say_the_same(made: Any) -> None:
    """rope_theta and rope_scaling beside each other, as before transformers 5."""
    for name in SIMPLE:
        config = {k: v for k, v in CASES[name].items() if k != "rope_parameters"}
        rope = dict(CASES[name]["rope_parameters"])
        config |= {"rope_theta": rope.pop("rope_theta")}
        if rope["rope_type"] == "yarn":
            config["rope_scaling"] = rope
        elif "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        assert read_config(config, "") == read_config(CASES[name], "")


def test_yarn_extends_the_context() -> None:
    """As model cards advise: rope_scaling is added to config.json, and nothing else is changed."""
    config = {**QWEN3, "max_position_embeddings": 40960, "rope_theta": 1e6}
    del config["rope_parameters"]
    for kind in ("rope_type", "type"):
        rope = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
        assert read_config({**config, "rope_scaling": rope}, "").max_position_embeddings == 131072
    assert read_config({**config, "rope_scaling": None}, "").max_position_embeddings == 40960
    with pytest.raises(CheckpointError, match="rope_parameters and rope_scaling differ"):
        read_config({**QWEN3, "rope_scaling": rope}, "")
    with pytest.raises(CheckpointError, match=r"rope_scaling\.original_max_position_embeddings must be an integer"):
        read_config({**config, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "")
