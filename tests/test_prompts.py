"""Weights and chunks. The oracles: AUTOMATIC1111's documented examples, and the encoder asked piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchsd.diffusion.builtin import BUILTIN
from batchsd.model.checkpoint import load
from batchsd.prompts import Prompts, a1111, weighted

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
    for prompts in (Prompts(encoder), Prompts(encoder, a1111, chunk=True)):
        for ours, theirs in zip(prompts(texts), encoder.encode(texts), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_long_text_is_its_chunks_end_to_end(encoder):
    room = encoder.length - 2
    words = ["red", "blue", "green", "cube"] * room  # one token each
    assert len(encoder.tokenizer(words[0], add_special_tokens=False).input_ids) == 1
    words = words[: 2 * room + 3]
    (found,) = Prompts(encoder, chunk=True)([" ".join(words)])
    parts = [" ".join(words[i : i + room]) for i in (0, room, 2 * room)]
    assert torch.allclose(found, encoder.encode(parts).flatten(0, 1), atol=1e-6)
    assert Prompts(encoder, chunk=True).tokens_cut(" ".join(words)) == 0


def test_what_is_cut_is_counted(encoder):
    room = encoder.length - 2
    long = " ".join(["red"] * (room + 5))
    assert Prompts(encoder).tokens_cut(long) == encoder.tokens_cut(long) == 5
    assert Prompts(encoder).tokens_cut("red " * room) == 0
    assert Prompts(encoder, a1111).tokens_cut(f"{long} BREAK {long}") == 10
    (found,) = Prompts(encoder)([long])
    assert torch.allclose(found, encoder.encode([long])[0], atol=1e-6)


def test_break_begins_a_chunk(encoder):
    (found,) = Prompts(encoder, a1111)(["a red cube BREAK a blue cone"])
    assert torch.allclose(found, encoder.encode(["a red cube", "a blue cone"]).flatten(0, 1), atol=1e-6)


def test_weights_fall_on_their_words_and_the_mean_stays(checkpoint):
    encoder = load(checkpoint).text
    for name, value in encoder.model.named_parameters():
        if name.endswith("final_layer_norm.bias"):
            value.fill_(0.3)  # random weights give states of mean 0; CLIP's have one of about -0.1
    states_TD = encoder.encode(["a red cube"])[0]
    (found_TD,) = Prompts(encoder, a1111)(["a (red:1.5) cube"])
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
    from batchsd.engine import Engine, Settings
    from batchsd.prompts import prompts_for
    from batchsd.tasks.text import TextTask
    from batchsd.testing.tasks import example_request
    from batchsd.types import Shard

    model = load(checkpoint)
    assert prompts_for(model, "plain", "truncate") is None
    engine = Engine(
        model, schedulers=BUILTIN, tasks={"text": TextTask()}, encode=lambda p: (p.tobytes(), "raw"),
        settings=Settings(lanes=CPU_LANES), encode_texts=prompts_for(model, "a1111", "chunk"),
    )  # fmt: skip

    def draw(*prompts: str) -> list[np.ndarray]:
        rows = [
            example_request(key=str(i), index=i, prompt=prompt, height=16, width=16, steps=3)
            for i, prompt in enumerate(prompts)
        ]
        found = {record.request.index: record for _, record in engine.generate([(Shard(1, 0, 1, 0, 0, 2), iter(rows))])}
        return [np.frombuffer(found[i].image or b"", np.uint8).astype(int) for i in range(len(rows))]

    long = "a (red:1.4) cube BREAK a blue cone"
    together, before = draw(long, "a red cube"), engine.meter.network_calls
    assert before == 3
    for prompt, picture in zip((long, "a red cube"), together, strict=True):
        assert np.abs(picture - draw(prompt)[0]).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1
