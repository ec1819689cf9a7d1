"""LLM and Session as a program uses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expertstream import LLM, BudgetError, ReadError, RequestError, UsageError, _native
from expertstream.responses import StopStrings

QUICK = {"memory": "64MiB", "context_length": 256}
PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(memory="48MiB", context_length=512)


def text_of(llm: LLM, prompt: str = PROMPT, **params: object) -> str:
    return "".join(piece.text for piece in llm.generate(prompt, **params))


def test_the_embedded_model_writes_english(llm: LLM) -> None:
    words = text_of(llm, max_tokens=120, seed=1).lower().split()
    common = {
        "the",
        "a",
        "and",
        "to",
        "was",
        "she",
        "he",
        "her",
        "his",
        "in",
        "of",
        "that",
        "had",
        "it",
        "with",
        "for",
        "they",
        "on",
        "is",
        "said",
    }
    assert len(words) > 50 and sum(word.strip(".,!\"'") in common for word in words) / len(words) > 0.25


def test_chat_answers_and_ends_by_itself(llm: LLM) -> None:
    pieces = list(
        llm.chat([{"role": "user", "content": "What can I cook with eggs and cheese?"}], temperature=0, max_tokens=200)
    )
    assert pieces[-1].finish_reason == "stop" and pieces[-1].token in llm.tokenizer.eos_ids
    assert "egg" in "".join(piece.text for piece in pieces)
    assert all("<|im_end|>" not in piece.text for piece in pieces)


def test_the_same_seed_is_the_same_text(llm: LLM) -> None:
    assert text_of(llm, seed=5, max_tokens=50) == text_of(llm, seed=5, max_tokens=50)
    assert text_of(llm, seed=5, max_tokens=50) != text_of(llm, seed=6, max_tokens=50)


def test_only_the_last_piece_has_a_finish_reason(llm: LLM) -> None:
    pieces = list(llm.generate(PROMPT, max_tokens=7, temperature=0))
    assert len(pieces) == 7 and [p.finish_reason for p in pieces] == [None] * 6 + ["length"]
    stats = pieces[-1].stats
    assert stats.generated_tokens == 7 and stats.prompt_tokens == len(llm.tokenizer.encode(PROMPT))
    assert stats.ttft_seconds > 0 and stats.decode_tps > 0
    experts = stats.decode_experts
    assert experts.hits + experts.misses == 6 * 12 * 4
    assert (
        sum(layer.hits + layer.misses for layer in stats.layers)
        == experts.hits + experts.misses + stats.prefill_experts.hits + stats.prefill_experts.misses
    )
    assert stats.to_json()["decode_experts"]["hit_rate"] == experts.hit_rate


def test_logprobs(llm: LLM) -> None:
    pieces = list(llm.generate(PROMPT, max_tokens=3, temperature=0, logprobs=2, repetition_penalty=1.0))
    for piece in pieces:
        assert piece.logprob is not None and piece.logprob.logprob <= 0
        # The likeliest token was taken, so it leads the alternatives.
        assert piece.logprob.top_logprobs[0] == (piece.logprob.token, piece.logprob.logprob)


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    whole = text_of(llm, max_tokens=60, temperature=0)
    stop = whole[20:26]
    pieces = list(llm.generate(PROMPT, max_tokens=60, temperature=0, stop=stop))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


@pytest.mark.parametrize("cut", range(1, 12))
def test_stop_strings_are_found_wherever_the_pieces_are_cut(cut: int) -> None:
    text = "ab END cd ENDING"
    stops = StopStrings(("ENDING", "END!"))
    shown = "".join(stops.add(text[at : at + cut]) for at in range(0, len(text), cut)) + stops.rest()
    assert shown == "ab END cd " and stops.found
    stops = StopStrings(("ENDURE",))
    assert "".join(stops.add(text[at : at + cut]) for at in range(0, len(text), cut)) + stops.rest() == text


def test_a_session_goes_on_where_it_stopped(llm: LLM) -> None:
    """A second turn continues prompt, answer and addition, the answer's last token included."""
    first, second = llm.tokenizer.encode("Once upon"), llm.tokenizer.encode(" girl who")
    params = llm.sampling_params(temperature=0, max_tokens=5, repetition_penalty=1.0)
    for used in (5, 3):  # an answer that came to its end, and one that was dropped
        session, answer = llm.session(), []
        for piece in session.generate(first, params):
            answer.append(piece.token)
            if len(answer) == used:
                break
        continued = [p.token for p in session.generate(second, params)]
        whole = np.concatenate([first, np.array(answer), second])
        assert continued == [p.token for p in llm.session().generate(whole, params)]
        session.reset()
        assert [p.token for p in session.generate(whole, params)] == continued


def test_a_closed_model_says_so() -> None:
    llm = LLM(**QUICK)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="this model is closed"):
        text_of(llm, max_tokens=3)


def test_several_threads_take_turns(llm: LLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = [text_of(llm, seed=s, max_tokens=20) for s in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda s: text_of(llm, seed=s, max_tokens=20), range(4))) == expected


def test_a_generation_that_is_dropped_leaves_the_model_usable(llm: LLM) -> None:
    for piece in llm.generate(PROMPT, max_tokens=50):
        if piece.stats.generated_tokens == 3:
            break
    assert llm.experts.link.reader.pending == 0
    assert text_of(llm, max_tokens=5, temperature=0)


def test_prompts_that_cannot_be_run(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(RequestError, match=r"room for 511; set context_length=\d+ or more"):
        llm.generate("word " * 600)
    with pytest.raises(RequestError, match="not valid UTF-8"):
        llm.generate("\udcff")


def test_the_context_ends_an_answer(llm: LLM) -> None:
    prompt = "the " * 506
    pieces = list(llm.generate(prompt, max_tokens=100, temperature=0, repetition_penalty=1.0))
    assert pieces[-1].finish_reason in ("length", "stop") and len(pieces) <= 512 - len(llm.tokenizer.encode(prompt)) + 1


def test_impossible_engines() -> None:
    with pytest.raises(BudgetError, match="needs at least"):
        LLM(memory="1MiB")
    with pytest.raises(UsageError, match=r"experts_per_token must be at most 4, .*; got 5"):
        LLM(experts_per_token=5)
    with pytest.raises(
        UsageError, match="context_length must be at most 8192, the context this model was trained for; got 8193"
    ):
        LLM(context_length=8193)
    with pytest.raises(UsageError, match="unknown instruction set 'sse9'"):
        LLM(isa="sse9", **QUICK)
    with pytest.raises(UsageError, match="unknown option 'momory'"):
        LLM(momory="1GiB")


def test_the_named_floor_is_enough() -> None:
    import re

    with pytest.raises(BudgetError) as caught:
        LLM(memory="1MiB", context_length=256, threads=1)
    floor = re.search(r"at least memory=(\d+)MiB", str(caught.value))
    assert floor is not None
    with LLM(memory=f"{floor[1]}MiB", context_length=256, threads=1) as llm:
        assert text_of(llm, max_tokens=5)


def test_what_is_no_prompt_and_no_option(llm: LLM) -> None:
    for wrong in (None, 5, [1, 2]):
        with pytest.raises(UsageError, match="a prompt must be str"):
            llm.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown sampling option 'max_token'"):
        llm.generate("x", max_token=5)
    with pytest.raises(UsageError, match="give either params or keywords"):
        llm.generate("x", llm.sampling_params(), seed=1)
    params, session = llm.sampling_params(), llm.session()
    for tokens in ([1, 2], "x", np.array([1.5]), np.array([[1]])):
        with pytest.raises(UsageError, match="one-dimensional array of integers"):
            session.generate(tokens, params)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a token must be at least 0; got -1"):
        session.generate(np.array([1, -1]), params)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"temperature": -1}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k must be an integer"),
        ({"top_p": "high"}, "top_p must be a number"),
    ],
)
def test_a_wrong_generation_config_is_named(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    import json
    import shutil

    from expertstream import CheckpointError
    from expertstream.engine import embedded_model

    folder = Path(shutil.copytree(embedded_model(), tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **entries}))
    with LLM(folder, **QUICK) as llm, pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        llm.generate("x")
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 20.0, "text_config": "x"}')
    with LLM(folder, **QUICK) as llm:
        assert llm.sampling_params().top_k == 20


def test_lossy_settings_are_named_with_every_result() -> None:
    with LLM(experts_per_token=2, **QUICK) as llm:
        pieces = list(llm.generate(PROMPT, max_tokens=2))
        assert all(p.stats.lossy == "2 of 4 experts per token" for p in pieces)


def test_a_read_that_fails_in_the_middle_ends_the_generation(faults: None) -> None:
    with LLM(memory="24MiB", context_length=256) as llm:
        pieces = []
        with pytest.raises(ReadError, match=r"layer \d+, expert \d+: read failed"):
            for piece in llm.generate(PROMPT, max_tokens=50):
                pieces.append(piece)
                if len(pieces) == 5:
                    _native.set_fault(0, 1, 5)
        assert len(pieces) >= 5


def test_readers_can_be_chosen(tmp_path: Path) -> None:
    with LLM(reader="pread", **QUICK) as llm:
        assert "pread" in llm.describe()
    with LLM(reader="uring", **QUICK) as llm:
        assert "io_uring" in llm.describe()


def test_a_context_that_memory_holds(pack_folder: Path) -> None:
    """Of a server: as long as the model was trained for, if a part of the memory holds it for all of its texts."""
    lengths = []
    for memory in ("4GiB", "60MiB"):
        with LLM(pack_folder, memory=memory, context_memory_fraction=1 / 8, sequences=4) as llm:
            lengths.append(llm.context_length)
    assert lengths[0] == 32768 > lengths[1] >= 8192


def test_a_session_goes_on_after_sampling_failed(llm: LLM) -> None:
    """The token before was read: it must not be read twice."""

    class Failing:
        calls = 0

        def mask(self, logits: np.ndarray) -> np.ndarray:
            self.calls += 1
            if self.calls == 3:
                raise RequestError("enough")
            return logits

        def accept(self, token: int) -> None:
            pass

    params = llm.sampling_params(max_tokens=8, temperature=0.0)
    session, tokens = llm.session(), llm.tokenizer.encode("Once upon a time")
    said = []
    with pytest.raises(RequestError, match="enough"):
        for piece in session.generate(tokens, params, constraint=Failing()):
            said.append(piece.token)
    more = llm.tokenizer.encode(" and then")
    found = [p.token for p in session.generate(more, params)]
    whole = np.concatenate([tokens, np.array(said), more])
    assert len(said) == 2 and session.cache.position == len(whole) + 7
    step = llm.session()
    llm.model(tokens, step.cache, prompt=True)
    for token in said:
        llm.model(np.array([token]), step.cache)
    assert found == [p.token for p in step.generate(more, params)]


def test_a_state_does_not_depend_on_the_instruction_set() -> None:
    prints = set()
    for isa in ("scalar", ""):
        with LLM(memory="64MiB", context_length=256, isa=isa) as llm:
            prints.add(llm.state_fingerprint())
    assert len(prints) == 1
