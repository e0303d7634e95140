"""Weights and chunks. The oracles: AUTOMATIC1111's documented examples, and the encoder asked piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchsd.diffusion.builtin import BUILTIN
from batchsd.engine import Engine, Settings
from batchsd.model.checkpoint import Model, load
from batchsd.prompts import Prompts, a1111, prompts_for, weighted
from batchsd.tasks.text import TextTask
from batchsd.testing.tasks import example_request
from batchsd.types import Record, Request, RowError, Shard
from tests.tasks.xl import write_xl

# From the docstring of its parse_prompt_attention, and its wiki.
EXAMPLES = {
    "normal text": [[("normal text", 1.0)]],
    "an (important) word": [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]],
    "(unbalanced": [[("unbalanced", 1.1)]],
    r"\(literal\]": [[("(literal]", 1.0)]],
    "(unnecessary)(parens)": [[("unnecessaryparens", 1.1)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [
            ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
            (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
        ]
    ],
    "[[x]]": [[("x", 1 / 1.21)]],
    "a BREAK (b BREAK c:2) BREAKFAST": [[("a ", 1.0)], [(" ", 1.0), ("b ", 2.0)], [(" c", 2.0), (" BREAKFAST", 1.0)]],
    "12:30 a) b]": [[("12:30 a) b]", 1.0)]],
    "(a:-1) (b: .5 )": [[("a", -1.0), (" ", 1.0), ("b", 0.5)]],
    "": [[]],
}  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_a1111_reads_what_it_says(text):
    found = a1111(text)
    assert [[words for words, _ in segment] for segment in found] == [
        [words for words, _ in segment] for segment in EXAMPLES[text]
    ]
    weights = [weight for segment in found for _, weight in segment]
    assert weights == pytest.approx([weight for segment in EXAMPLES[text] for _, weight in segment])


@given(st.text(alphabet="ab ()[]:.19\\BREAK", max_size=40))
def test_no_text_is_refused_and_no_word_is_lost(text):
    words = "".join(words for segment in a1111(text) for words, _ in segment)
    assert words.count("a") == text.count("a") and words.count("b") == text.count("b")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path):
    return load(checkpoint).text


def test_plain_short_texts_are_encoded_as_ever(encoder):
    texts = ["a red cube, left of a blue sphere", "", "a green cone"]
    for prompts in (Prompts((encoder,)), Prompts((encoder,), a1111, chunk=True)):
        for (ours, _), theirs in zip(prompts(texts), encoder.encode(texts), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_long_text_is_its_chunks_end_to_end(encoder):
    room = encoder.length - 2
    words = ["red", "blue", "green", "cube"] * room  # one token each
    assert len(encoder.tokenizer(words[0], add_special_tokens=False).input_ids) == 1
    words = words[: 2 * room + 3]
    ((found, _),) = Prompts((encoder,), chunk=True)([" ".join(words)])
    parts = [" ".join(words[i : i + room]) for i in (0, room, 2 * room)]
    assert torch.allclose(found, encoder.encode(parts).flatten(0, 1), atol=1e-6)
    assert Prompts((encoder,), chunk=True).tokens_cut(" ".join(words)) == 0


def test_what_is_cut_is_counted(encoder):
    room = encoder.length - 2
    long = " ".join(["red"] * (room + 5))
    assert Prompts((encoder,)).tokens_cut(long) == encoder.tokens_cut(long) == 5
    assert Prompts((encoder,)).tokens_cut("red " * room) == 0
    assert Prompts((encoder,), a1111).tokens_cut(f"{long} BREAK {long}") == 10
    ((found, _),) = Prompts((encoder,))([long])
    assert torch.allclose(found, encoder.encode([long])[0], atol=1e-6)


def test_break_begins_a_chunk(encoder):
    ((found, _),) = Prompts((encoder,), a1111)(["a red cube BREAK a blue cone"])
    assert torch.allclose(found, encoder.encode(["a red cube", "a blue cone"]).flatten(0, 1), atol=1e-6)


def test_weights_fall_on_their_words_and_the_mean_stays(checkpoint):
    encoder = load(checkpoint).text
    for name, value in encoder.model.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            value.fill_(0.3)  # random weights give states of mean 0; CLIP's have one of about -0.1
    states_TD = encoder.encode(["a red cube"])[0]
    ((found_TD, _),) = Prompts((encoder,), a1111)(["a (red:1.5) cube"])
    assert float(found_TD.mean()) == pytest.approx(float(states_TD.mean()), rel=1e-3)
    assert float(states_TD.mean()) == pytest.approx(0.3, rel=1e-3)
    ratio_T = (found_TD / states_TD).median(1).values
    assert torch.allclose(ratio_T / ratio_T[0], torch.where(torch.arange(len(ratio_T)) == 2, 1.5, 1.0), atol=1e-4)


def test_the_mean_is_each_chunks_own():
    states = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[1.0, 1.0], [1.0, 1.0]]])
    found = weighted(states, torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    assert torch.allclose(found[0], torch.tensor([[2.0, 6.0], [5.0, 7.0]]) * 16 / 20)
    assert torch.equal(found[1], states[1])
    without = torch.tensor([[[1.0, -1.01], [2.0, -1.0]]])  # a mean of 0.25, 0.75 after
    assert torch.equal(weighted(without, torch.tensor([[1.0, 3.0]]))[0, 0], without[0, 0])


def test_rows_of_different_lengths_share_network_calls(checkpoint: Path) -> None:
    """A long prompt beside a short negative, and a short row: each as it is alone."""
    from batchsd.batch_size import CPU_LANES

    model = load(checkpoint)
    assert prompts_for(model, "plain", "truncate") is None
    engine = new_engine(model, prompts_for(model, "a1111", "chunk"), lanes=CPU_LANES)

    def draw(*prompts: str) -> list[np.ndarray]:
        rows = [row(i, prompt=prompt) for i, prompt in enumerate(prompts)]
        found = {record.request.index: record for record in drawn(engine, rows)}
        return [np.frombuffer(found[i].image or b"", np.uint8).astype(int) for i in range(len(rows))]

    long = "a (red:1.4) cube BREAK a blue cone"
    together, before = draw(long, "a red cube"), engine.meter.network_calls
    assert before == 3
    for prompt, picture in zip((long, "a red cube"), together, strict=True):
        assert np.abs(picture - draw(prompt)[0]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


def test_tokens_cut_is_told_of_every_row(checkpoint: Path) -> None:
    """Drawn, failed, and refused, in plain and in A1111's syntax, cut and in chunks."""
    model = load(checkpoint)
    room = model.text.length - 2
    long = " ".join(["(red:1.2)"] * (room + 5))
    plainly = len(model.text.tokenizer(long, verbose=False).input_ids) - 2 - room
    assert plainly > 5, "brackets and numbers are tokens of a plain prompt"
    settings = {("plain", "truncate"): plainly, ("a1111", "truncate"): 5, ("a1111", "chunk"): 0}
    for names, cut in settings.items():
        rows = [
            row(0, prompt=long),
            row(1, prompt="a red cube"),
            row(2, prompt=long, height=17),
            row(3, prompt=None, error=RowError("bad_input", "prompt: null")),
        ]
        found = {r.request.index: r for r in drawn(new_engine(model, prompts_for(model, *names)), rows)}
        assert [found[i].tokens_cut for i in range(4)] == [cut, 0, cut, None]
        assert [found[i].status for i in range(4)] == ["ok", "ok", "bad_input", "bad_input"]


def test_sdxl_reads_weights_and_chunks_with_both_encoders(tmp_path: Path) -> None:
    """A chunk is what each encoder makes of it alone; the pooled text is the first chunk's, as A1111 has it."""
    model = load(write_xl(tmp_path / "xl"))
    read = prompts_for(model, "a1111", "chunk")
    assert read is not None and model.text_2 is not None
    for text in ("a red cube", None):
        ((states_TD, pooled_P),) = read([text])
        theirs_BTD, theirs_BP = model.encode_prompts([text])
        assert theirs_BP is not None
        assert torch.allclose(states_TD, theirs_BTD[0], atol=1e-5) and torch.allclose(pooled_P, theirs_BP[0], atol=1e-5)
    words = "a red cube BREAK a blue cone"
    ((states_TD, pooled_P),) = read([words])
    parts_BTD, pooled_BP = model.encode_prompts(["a red cube", "a blue cone"])
    assert torch.allclose(states_TD, parts_BTD.flatten(0, 1), atol=1e-5)
    assert pooled_BP is not None and torch.allclose(pooled_P, pooled_BP[0], atol=1e-5)
    one, other = drawn(new_engine(model, read), [row(0, prompt="a cube BREAK a cone"), row(1, prompt="a cube")])
    assert one.status == other.status == "ok" and one.image != other.image


def row(index: int, **changes: object) -> Request:
    return example_request(**{"key": str(index), "index": index, "height": 16, "width": 16, "steps": 3, **changes})


def new_engine(model: Model, prompts: Prompts | None, lanes: int = 16) -> Engine:
    return Engine(
        model, schedulers=BUILTIN, tasks={"text": TextTask()}, encode=lambda p: (p.tobytes(), "raw"),
        settings=Settings(lanes=lanes), prompts=prompts,
    )  # fmt: skip


def drawn(engine: Engine, rows: list[Request]) -> list[Record]:
    shard = Shard(1, 0, 1, 0, 0, len(rows))
    return [record for _, record in engine.generate([(shard, iter(rows))])]
