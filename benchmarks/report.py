"""Tables and plots from measured rows: what pytest-benchmark stored (.json), or benchmarks/gpu/run.py (.jsonl).

    python benchmarks/report.py results.json gpu/results.jsonl --out results

writes OUT/report.md, and a plot for each kind of row. A ratio is the peer's time over ours, median [20th, 80th
percentile] of rounds; it is bold where that interval leaves out 1, so that the difference is not noise.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

OURS, NULL = "fastlm", "null"


def load(paths: list[Path]) -> list[dict]:
    """Rows of every file, each with its "device", as a heading names it."""
    rows = []
    for path in paths:
        if path.suffix == ".jsonl":
            found = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            found = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
        machines = [row for row in found if row.get("kind") == "machine"]
        for row in found:
            facts = row.get("machine") or (machines[0] if machines else {})
            row["device"] = facts.get("device", "unknown") + busy(facts)
        rows += [row for row in found if "ratio" in row]
    return rows


def busy(facts: dict) -> str:
    """A warning where others used the processor too: threads that wait for one another then wait for a turn, and ratios
    mislead.
    """
    crowded = float(facts.get("load", 0)) > 1.5 * int(facts.get("threads", 1))
    return f" (BUSY: load {facts['load']} on {facts['threads']} threads)" if crowded else ""


def ratio(spread: dict) -> str:
    text = f"{spread['median']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}]"
    return f"**{text}**" if spread["p20"] > 1 or spread["p80"] < 1 else text


def seconds(spread: dict) -> str:
    ms = 1e3 * spread["median"]
    return f"{1e3 * ms:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def peers(row: dict) -> str:
    """Every peer's ratio, and in brackets the noise; then who was left out."""
    said = [f"{name} {ratio(spread)}" for name, spread in row["ratio"].items() if name != NULL]
    null = row["ratio"][NULL]
    return (
        "; ".join([*said, *(f"{name} left out" for name in row["left_out"])])
        + f" (null {null['p20']:.2f}–{null['p80']:.2f})"
    )


def attention_line(row: dict) -> str:
    problem = f"{row['scheme']} {row['direction']}, B{row['B']} H{row['H']} L{row['L']} D{row['D']} {row['dtype']}"
    ours = row["seconds"][OURS]
    speed = row["flops"] / ours["median"]
    share = f", {100 * speed / row['matmul']:.0f} % of torch.mm" if "matmul" in row else ""
    return f"| {problem} | {seconds(ours)} | {speed / 1e12:.3g} TFLOP/s{share} | {peers(row)}{memory(row)} |"


def memory(row: dict) -> str:
    grown = [f"{name} {n / 2**20:.1f}" for name, n in row.get("memory", {}).items() if n is not None]
    return f"; memory, MiB: {', '.join(grown)}" if grown else ""


def optimizer_line(row: dict) -> str:
    ours = row["seconds"][OURS]
    speed = row["bytes"] / ours["median"]
    rate = f"{speed / 1e9:.0f} GB/s, {100 * speed / row['copy']:.0f} % of copy"
    return f"| {row['step']} {row['shapes']} ({row['clock']}) | {seconds(ours)} | {rate} | {peers(row)} |"


def loss_line(row: dict) -> str:
    ours = row["seconds"][OURS]
    speed = row["flops"] / ours["median"]
    rate = f"{speed / 1e9:.0f} GFLOP/s in its three products, {100 * speed / row['matmul']:.0f} % of torch.mm"
    rows = f"N {row['N']}" + (f", {100 * row['targets']:.0f} % of them targets," if row["targets"] < 1 else "")
    return (
        f"| {rows} V {row['V']} D {row['D']} {row['dtype']} ({row['clock']}) | {seconds(ours)} | {rate} "
        f"| {peers(row)}{memory(row)} |"
    )


def model_line(row: dict) -> str:
    ours, tokens = row["seconds"][OURS], row["B"] * (row["L"] if row["step"] == "train" else row["written"])
    peaks = [
        f"{name} {n['peak'] / 2**20:.0f}, {n['grows'] / 2**20:.0f} of it in the step" for name, n in row["peak"].items()
    ]
    memory = f"; peak memory, MiB: {'; '.join(peaks)}" if peaks else ""
    problem = f"{row['step']} {row['model']}, B{row['B']} L{row['L']}"
    return f"| {problem} | {seconds(ours)} | {tokens / ours['median']:.3g} tokens/s | {peers(row)}{memory} |"


def markdown(rows: list[dict]) -> str:
    """A table for each device and kind."""
    parts = []
    by_table = lambda row: (row["device"], row["kind"])
    for (device, kind), group in groupby(sorted(rows, key=by_table), by_table):
        group = list(group)
        line = {"models": model_line, "loss": loss_line}.get(kind)
        line = line or (attention_line if "flops" in group[0] else optimizer_line)
        parts += [
            f"\n### {kind} on {device}\n",
            "| | fastlm | rate | peers' time over ours |",
            "|---|---|---|---|",
            *map(line, group),
        ]
    return "\n".join(parts) + "\n"


def draw_attention(rows: list[dict], title: str, path: Path) -> None:
    """TFLOP/s over length: a panel for each scheme and direction, a line for each contestant."""
    import matplotlib.pyplot as plt

    panels = sorted({(row["scheme"], row["direction"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = sorted((row for row in rows if (row["scheme"], row["direction"]) == panel), key=lambda row: row["L"])
        for name in dict.fromkeys(name for row in mine for name in row["seconds"] if name != NULL):
            points = [
                (row["L"], row["flops"] / row["seconds"][name]["median"] / 1e12)
                for row in mine
                if name in row["seconds"]
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1)
        axis.set(xscale="log", xlabel="length", ylabel="TFLOP/s", title=" ".join(panel))
        axis.set_xticks(
            sorted({row["L"] for row in mine}), [str(L) for L in sorted({row["L"] for row in mine})], minor=False
        )
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_optimizer(rows: list[dict], title: str, path: Path) -> None:
    """GB/s by ideal bytes: a group of bars for each row, and the machine's own copy rate as a line."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1.5 + 1.6 * len(rows), 4), layout="constrained")
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != NULL))
    for k, name in enumerate(names):
        bars = [
            (i, row["bytes"] / row["seconds"][name]["median"] / 1e9)
            for i, row in enumerate(rows)
            if name in row["seconds"]
        ]
        axis.bar([i + k / (len(names) + 1) for i, _ in bars], [y for _, y in bars], 1 / (len(names) + 1), label=name)
    axis.axhline(rows[0]["copy"] / 1e9, color="grey", linestyle="--", label="copy")
    axis.set_xticks(range(len(rows)), [f"{row['step']}\n{row['shapes']}\n{row['clock']}" for row in rows], fontsize=8)
    axis.set(ylabel="GB/s by ideal bytes", title=title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(rows: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    by_plot = lambda row: (row["kind"], row["device"], row.get("dtype", ""), row.get("D", 0))
    for (kind, device, dtype, D), group in groupby(sorted(rows, key=by_plot), by_plot):
        machine = "".join(c if c.isalnum() else "-" for c in device.lower())
        group = list(group)
        if kind.startswith(("tiles", "models", "loss")):  # one size each
            continue
        if kind == "attention":
            draw_attention(
                group, f"attention, {dtype}, D {D}, {device}", folder / f"attention-{dtype}-d{D}-{machine}.png"
            )
        else:
            draw_optimizer(group, f"{kind}, {device}", folder / f"{kind}-{machine}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and plots from measured rows.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows = load(arguments.results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.md").write_text(markdown(rows))
    draw(rows, arguments.out)
    print(markdown(rows))


if __name__ == "__main__":
    main()
