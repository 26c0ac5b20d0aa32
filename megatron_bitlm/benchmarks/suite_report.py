"""The suite's report as Markdown: what passed, and each benchmark's ratios, rates, memory and MFU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_bitlm.benchmarks.report import device_line

_HEADER = "| | median ms | time ÷ {baseline} (quartiles) | tokens/s | rate ÷ same | peak GB | TFLOP/s | MFU |"


def markdown(report: dict[str, Any]) -> str:
    """A report of `bench_suite` for reading.

    MFU is model FLOPs (attention by the keys that are seen, nothing for recomputation) over the peak of BF16 products,
    also where products run in FP8.
    """
    facts = report["facts"]
    lines = ["# GPU suite", "", device_line(report["machine"]), ""]
    if not facts["with_fp8"]:
        missing = "this GPU has no FP8" if facts["transformer_engine"] else "Transformer Engine is not installed"
        lines += [f"FP8 was left out: {missing}.", ""]
    for name, found in facts["parts"].items():
        lines += [f"## {name}", "", *_section(found), ""]
    lines.append("MFU is of the peak of BF16 products, in the FP8 rows, too.")
    return "\n".join(lines) + "\n"


def _section(found: dict[str, Any]) -> Iterator[str]:
    if found["error"] is not None:
        yield f"**Failed**: {found['error']}"
    if "num_passed" in found:
        yield f"{found['num_passed']} tests passed, {len(found['failed'])} failed, {found['num_skipped']} skipped."
        yield from (f"- {name}" for name in found["failed"])
    report = found.get("report")
    if report is None:
        return
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items() if value not in (None, ""))
    yield f"{report['benchmark']}: {settings}"
    yield ""
    yield _HEADER.format(baseline=report["baseline"])
    yield "|---|" + "---|" * 7
    for name, figures in report["variants"].items():
        yield _row(name, figures, report["facts"].get(name))
    for name, reason in report["facts"].get("left_out", {}).items():
        yield f"\n{name} was left out: {reason}."


def _row(name: str, figures: dict[str, Any], facts: Any) -> str:
    rate, ratio = figures.get("tokens_per_second"), figures["time_ratio"]
    peak = figures.get("peak_bytes")
    facts = facts if isinstance(facts, dict) else {}
    flops, mfu = facts.get("model_flops_per_second"), facts.get("mfu")
    cells = [
        name,
        f"{figures['seconds']['median'] * 1e3:.2f}",
        f"{ratio['median']:.3f} ({ratio['quartile_low']:.3f} to {ratio['quartile_high']:.3f})",
        f"{rate['median']:,.0f}" if rate else "",
        f"{figures['rate_ratio']['median']:.3f}" if "rate_ratio" in figures else "",
        f"{peak / 1e9:.2f}" if peak else "",
        f"{flops / 1e12:.0f}" if flops else "",
        f"{mfu:.1%}" if mfu else "",
    ]
    return "| " + " | ".join(cells) + " |"
