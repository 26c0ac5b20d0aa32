"""The table and the picture that set a BitLM beside a softmax model."""

import matplotlib.image
import pytest
from matplotlib.text import Text

from megatron_bitlm.evaluation import comparison, figures, plots
from megatron_bitlm.evaluation.comparison import TrainedModel, describe_comparison, plot_comparison


def trained(name, is_exact, nats, seconds, num_steps):
    records = [
        {"step": step, "tokens": 100 * step, "seconds": seconds, "loss": 3.0 / step} for step in range(1, num_steps + 1)
    ]
    for record in records[1::2]:
        record["validation/bits_per_byte"] = nats + 1 / record["step"]
    likelihood = {"nats_per_token": nats, "standard_error": 0.05, "bits_per_byte": 1.5 * nats, "num_tokens": 12_345}
    return TrainedModel(name, is_exact, likelihood, records, 1000, 42.0)


MODELS = (trained("BitLM", False, 2.5, 0.5, 6), trained("softmax", True, 1.5, 0.25, 12))


def test_summaries_and_curves_count_training_steps_alone():
    bitlm, softmax = (model.summary() for model in MODELS)
    assert bitlm["training_seconds"] == softmax["training_seconds"] == 3.0
    assert (bitlm["training_tokens"], softmax["training_tokens"]) == (600, 1200)
    assert softmax["training_tokens_per_second"] == 400 and softmax["training_steps"] == 12
    assert (bitlm["relation"], softmax["relation"]) == ("<=", "=")
    seconds, tokens, bits = MODELS[0].curve()
    assert seconds == [1.0, 2.0, 3.0] and tokens == [200, 400, 600]
    assert bits == pytest.approx([3.0, 2.75, 2.5 + 1 / 6])


def test_the_table_tells_a_bound_from_an_exact_value():
    _, bitlm, softmax, note = describe_comparison(MODELS).splitlines()
    assert bitlm.split()[:5] == ["BitLM", "<=", "2.5000", "+-", "0.0500"]
    assert softmax.split()[:5] == ["softmax", "=", "1.5000", "+-", "0.0500"]
    assert "1,200" in softmax and "12,345 held-out tokens" in note and "upper bound" in note


def test_the_picture(tmp_path, monkeypatch):
    drawn = []

    def keep(figure, path):
        drawn.append(figure)
        figures.save_figure(figure, path)

    monkeypatch.setattr(comparison, "save_figure", keep)
    plot_comparison(MODELS, tmp_path / "comparison.png", {"unigram": 4.9, "bigram": 3.9})
    assert matplotlib.image.imread(tmp_path / "comparison.png").std() > 0.01
    said = {text.get_text() for text in drawn[0].findobj(Text)}
    assert {
        "BitLM, upper bound",
        "softmax, exact",
        "unigram 4.90",
        "training seconds",
        "training tokens, millions",
    } <= said
    assert any("BitLM ≤ 3.75, softmax = 2.25" in text for text in said)
    lines = drawn[0].axes[1].get_lines()[:2]
    assert [line.get_xdata()[-1] for line in lines] == [0.0006, 0.0012]


def test_a_softmax_run_has_no_bound_in_its_loss_picture(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    records = [{**record, "validation/is_exact": True} for record in MODELS[1].records]
    plots.plot_loss(records, tmp_path / "loss.png", {"unigram": 4.4})
    said = [text.get_text() for text in drawn[0].findobj(Text)]
    assert any(text.startswith("Held-out likelihood = 1.58 bits/byte") for text in said)
    assert "training loss (nats per token)" in said and not any("bound" in text for text in said)
