"""The pictures: what they say is read off their text objects; files are complete or absent."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from megatron_bitlm.errors import BitLMError
from megatron_bitlm.evaluation import denoising, figures, plots
from megatron_bitlm.evaluation.plots import plot_denoising, plot_loss, read_metrics


@pytest.fixture
def drawn(monkeypatch):
    """Keeps the figures that are saved."""
    kept = []

    def keep(figure, path):
        kept.append(figure)
        figures.save_figure(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    monkeypatch.setattr(denoising, "save_figure", keep)
    return kept


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def training_records(num_steps=40):
    records = [{"step": step, "loss": 1 / step, "error_by_time/0.0-0.5": 0.1} for step in range(1, num_steps + 1)]
    records.append({"step": 20, "validation/bits_per_byte": 5.0, "validation/nats_per_token": 3.5})
    records.append({"step": 40, "validation/bits_per_byte": 3.0, "validation/nats_per_token": 2.1})
    return records


def is_picture(path):
    pixels = matplotlib.image.imread(path)
    return pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels[..., :3].std() > 0.01


def test_loss_picture_says_where_the_bound_stands(tmp_path, drawn):
    plot_loss(training_records(), tmp_path / "deep" / "loss.png", {"unigram": 4.4, "bigram": 2.9})
    assert is_picture(tmp_path / "deep" / "loss.png")
    said = texts(drawn[0])
    assert "Held-out bound ≤ 3.00 bits/byte: below unigram, above bigram" in said
    assert {"unigram 4.40", "bigram 2.90", "optimizer step", "0.0-0.5"} <= set(said)
    assert any("bits/byte" in text and "likelihood" in text for text in said)
    assert len(drawn[0].axes) == 3


def test_loss_picture_without_validation_or_buckets(tmp_path, drawn):
    plot_loss([{"step": 1, "loss": 1.0}], tmp_path / "loss.png", metric="nats_per_token")
    assert "No validation was run" in texts(drawn[0])
    assert len(drawn[0].axes) == 2


def test_a_step_logged_again_counts_with_its_later_value(tmp_path, drawn):
    records = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]
    plot_loss(records, tmp_path / "loss.png")
    raw = drawn[0].axes[0].get_lines()[0]
    assert raw.get_xydata().tolist() == [[1, 2], [2, 1]]


def test_smoothing_equals_means_of_slices():
    values = np.random.default_rng(0).normal(size=30)
    smoothed = plots._smooth(values, 8)
    for place in range(30):
        reach = min(place, 4)
        assert smoothed[place] == pytest.approx(values[place - reach : place + reach + 1].mean())


def test_loss_picture_refuses_what_it_cannot_draw(tmp_path):
    with pytest.raises(BitLMError, match="No training loss"):
        plot_loss([{"step": 1, "validation/bits_per_byte": 2.0}], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="bits_per_byte, nats_per_token"):
        plot_loss(training_records(), tmp_path / "loss.png", metric="perplexity")
    assert not list(tmp_path.iterdir())


def block(num_steps=15, num_slots=4, num_bits=9):
    rng = np.random.default_rng(0)
    clean = np.sign(rng.normal(size=(num_slots, num_bits)))
    times = np.linspace(1, 0, num_steps + 1)
    noise = rng.normal(size=clean.shape)
    return (1 - times)[:, None, None] * clean + times[:, None, None] * noise, times, clean


def test_denoising_picture_spells_the_final_bits_and_tokens(tmp_path, drawn):
    states, times, clean = block()
    path = tmp_path / "denoising.png"
    plot_denoising(states, times, ["the", "$x^2$", "\n", "\x00é"], path)
    assert is_picture(path)
    said = texts(drawn[0])
    digits = [text for text in said if text in ("0", "1")]
    assert digits == [str(int(bit > 0)) for bit in clean.ravel()]
    assert {"'the'", "'$x^2$'", r"'\n'", r"'\x00é'"} <= set(said)
    assert {"1.00", "0.00", "token 4"} <= set(said)
    assert "4 tokens of 9 bits, decided together in 15 steps" in said
    assert "nearest tokens" not in said


def test_denoising_picture_shows_when_each_token_settles(tmp_path, drawn):
    states, times, _ = block(num_steps=3, num_slots=2)
    rows = [["a", "x"], ["b", "x"], ["b", "y"], ["b", "z"]]
    plot_denoising(states, times, rows, tmp_path / "denoising.png")
    beside = [
        (text.get_text(), text.get_fontweight())
        for text in drawn[0].findobj(Text)
        if text.get_text() in ("'a'", "'b'", "'x'", "'y'", "'z'") and text.get_fontsize() == 8
    ]
    bold = {text for text, weight in beside if weight == "bold"}
    assert len(beside) == 8
    assert bold == {"'b'", "'z'"}


def test_denoising_heading_names_the_last_change_of_sign(tmp_path, drawn):
    states = np.ones((5, 1, 3))
    states[:2, 0, 1] = -1
    plot_denoising(states, [1, 0.75, 0.5, 0.25, 0], ["a"], tmp_path / "denoising.png")
    assert "from noise down to text; no bit changes sign after t = 0.50" in texts(drawn[0])


@pytest.mark.parametrize(("num_steps", "num_slots", "num_bits"), [(1, 1, 1), (15, 8, 18), (100, 2, 18)])
def test_denoising_picture_of_any_shape(tmp_path, num_steps, num_slots, num_bits):
    states, times, _ = block(num_steps, num_slots, num_bits)
    for quantity in ("belief", "state"):
        path = tmp_path / f"{quantity}.png"
        plot_denoising(states, times, [[" international"] * num_slots] * (num_steps + 1), path, quantity=quantity)
        assert is_picture(path)


def test_belief_is_the_posterior_mean_of_a_uniform_bit():
    states, times = np.array([[[0.3]], [[-0.8]], [[0.2]]]), np.array([1.0, 0.4, 0.0])

    def mean(a, t):
        plus, minus = (np.exp(-((a - (1 - t) * bit) ** 2) / (2 * t**2)) for bit in (1, -1))
        return (plus - minus) / (plus + minus)

    belief = denoising._belief(states, times)[:, 0, 0]
    assert belief == pytest.approx([mean(0.3, 1.0), mean(-0.8, 0.4), 1.0])


def test_denoising_picture_refuses_disagreeing_shapes(tmp_path):
    states, times, _ = block(num_slots=2)
    path = tmp_path / "denoising.png"
    with pytest.raises(ValueError, match="states"):
        plot_denoising(states, times[1:], ["a", "b"], path)
    with pytest.raises(ValueError, match="2 texts, or 16 rows of 2 texts"):
        plot_denoising(states, times, ["a"], path)
    with pytest.raises(ValueError, match="16 rows"):
        plot_denoising(states, times, [["a", "b"]], path)
    with pytest.raises(ValueError, match="belief, state"):
        plot_denoising(states, times, ["a", "b"], path, quantity="logits")


def test_text_the_font_lacks_is_escaped():
    assert figures.printable("a中\t") == r"'a\u4e2d\t'"


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    plot_loss(training_records(), path)
    before = path.read_bytes()

    def fail(file):
        raise OSError("disk full")

    monkeypatch.setattr(figures.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_loss(training_records(20), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_read_metrics_leaves_out_a_line_cut_off_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n\n{"step": 2, "loss": 0.4}\n{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]


def test_read_metrics_round_trip(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in training_records()))
    assert read_metrics(path) == training_records()


def test_read_metrics_names_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(BitLMError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(BitLMError, match="line 1 is not a JSON object"):
        read_metrics(path)
    with pytest.raises(BitLMError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")
