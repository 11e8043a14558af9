"""Draw the pictures of README.md as SVG: `python docs/draw.py` writes them beside this file.

speed.svg is drawn from figures.jsonl, in which `bench.py --json` adds a line a run; of several runs
of the same workload their median is drawn. Colours are of middle brightness, legible on white and
on black; the background is transparent.
"""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
TEXT, LINE = "#7d7d7d", "#9a9a9a"
COLOURS = {"nano-vLLM": "#2f81f7", "vLLM": "#c2702a", "nano-vllm": "#3d9a50"}
TITLES = {"qwen3-0.6b": "Qwen3-0.6B", "qwen3-8b": "Qwen3-8B"}
STYLE = "font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def svg(width: int, height: int, *parts: str) -> str:
    """A whole file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [f'{head} width="{width}" height="{height}" style="{STYLE}">', *parts, "</svg>\n"]
    )


def text(
    x: float, y: float, words: str, anchor: str = "middle", size: int = 13, **more: str
) -> str:
    """One line of text; more: SVG attributes."""
    style = {"fill": TEXT, "font-size": f"{size}", "text-anchor": anchor} | more
    attributes = " ".join(f'{name}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{words}</text>'


def line(
    points: list[tuple[float, float]], colour: str = LINE, width: float = 1, end: str = ""
) -> str:
    """A polyline; end: the id of a marker at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    marker = f' marker-end="url(#{end})"' if end else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{marker}/>'
    )


# --- how a request goes


def request() -> str:
    """Sequence -> Scheduler -> ModelRunner -> model -> sampler and back, and the blocks below."""
    boxes = {
        "sequence": (10, "Sequence", "tokens, block table"),
        "scheduler": (195, "Scheduler", "who runs in a step"),
        "runner": (380, "ModelRunner", "the step as tensors"),
        "model": (565, "model", "layers and kernels"),
        "sampler": (750, "sampler", "one id a sequence"),
    }
    width, height, top = 145, 56, 40
    middle, bottom = top + height / 2, top + height
    left = {name: x for name, (x, *_) in boxes.items()}
    centre = {name: x + width / 2 for name, x in left.items()}
    tip = f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/>'
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"'
    parts = [f'<defs><marker id="tip" {size} orient="auto">{tip}</marker></defs>']
    parts += [box(x, top, width, height, *words) for x, *words in boxes.values()]
    for x, following in pairwise(left.values()):
        parts.append(line([(x + width, middle), (following - 1, middle)], end="tip"))
    prompt = centre["sequence"]
    parts.append(line([(prompt, 20), (prompt, top - 1)], end="tip"))
    parts.append(text(prompt, 14, "prompt in, result out", size=12))
    # The way back: above the boxes.
    back = [(centre["sampler"], top), (centre["sampler"], 20), (centre["scheduler"], 20)]
    parts.append(line([*back, (centre["scheduler"], top - 1)], end="tip"))
    words = "sampled ids are appended to their sequences, and the next step is scheduled"
    parts.append(text((centre["sampler"] + centre["scheduler"]) / 2, 14, words, size=12))
    # Below: who owns the blocks, and where they lie.
    low = bottom + 50
    for name, below, title, role, words, anchor in (
        ("scheduler", low, "BlockManager", "who owns which block", "takes, frees, finds", "end"),
        ("model", low, "KV pool", "K and V, by block", "stores, attends", "start"),
    ):
        x = centre[name]
        parts.append(box(left[name], below, width, height, title, role))
        parts.append(line([(x, bottom), (x, below - 1)], end="tip"))
        side = x - 8 if anchor == "end" else x + 8
        parts.append(text(side, (bottom + below) / 2 + 4, words, anchor, 12))
    between = [(left["scheduler"] + width, low + height / 2), (left["model"] - 1, low + height / 2)]
    parts.append(line(between, end="tip"))
    words = "block tables name places in it"
    parts.append(text((between[0][0] + between[1][0]) / 2, between[0][1] - 8, words, size=12))
    return svg(905, int(low) + height + 10, *parts)


def box(x: float, y: float, width: float, height: float, title: str, role: str) -> str:
    """A rounded box with a name and what it is for."""
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="none"'
    middle = x + width / 2
    return "\n".join(
        (
            f'{frame} stroke="{COLOURS["nano-vLLM"]}" stroke-width="1.5"/>',
            text(middle, y + 24, title, size=14, **{"font-weight": "600"}),
            text(middle, y + 43, role, size=12),
        )
    )


# --- speed against the floor


def speed(figures: list[dict[str, Any]]) -> str:
    """A panel a model: share of the floor by the number of requests, a line an engine."""
    left, top, width, height, gap = 48, 34, 340, 210, 60
    parts = []
    for panel, (model, title) in enumerate(TITLES.items()):
        x0 = left + panel * (width + gap)
        parts.append(text(x0 + width / 2, 18, f"{title}, share of the floor", size=14))
        for percent in range(0, 101, 20):
            y = top + height * (1 - percent / 100)
            parts.append(line([(x0, y), (x0 + width, y)], width=1 if percent in (0, 100) else 0.3))
            parts.append(text(x0 - 6, y + 4, f"{percent}%", "end", 12))
        of_model = [figure for figure in figures if figure["model"] == model]
        sizes = sorted({figure["num_seqs"] for figure in of_model})
        xs = {size: x0 + width * (i + 0.5) / len(sizes) for i, size in enumerate(sizes)}
        for size, x in xs.items():
            parts.append(text(x, top + height + 18, f"{size}", size=12))
        parts.append(text(x0 + width / 2, top + height + 36, "requests at a time", size=12))
        for engine, colour in COLOURS.items():
            shares = {size: shares_of(of_model, engine, size) for size in sizes}
            points = [
                (xs[size], top + height * (1 - median(found)))
                for size, found in shares.items()
                if found
            ]
            if points:
                parts.append(line(points, colour, 2.5))
            parts += [f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{colour}"/>' for x, y in points]
    low = top + height + 60
    legend = {"nano-vLLM": "nano-vLLM (this library)", "vLLM": "vLLM", "nano-vllm": "nano-vllm"}
    for x, (engine, words) in zip(
        (left + 180, left + 420, left + 530), legend.items(), strict=True
    ):
        parts.append(line([(x, low), (x + 26, low)], COLOURS[engine], 2.5))
        parts.append(text(x + 34, low + 4, words, "start"))
    return svg(left + 2 * width + gap + 10, low + 16, *parts)


def shares_of(figures: list[dict[str, Any]], engine: str, num_seqs: int) -> list[float]:
    """An engine's shares of the floor, of every recorded run with so many requests."""
    return [
        figure["floor_share"]
        for figure in figures
        if figure["engine"] == engine and figure["num_seqs"] == num_seqs
    ]


def pictures() -> dict[str, str]:
    """Every picture by the name of its file."""
    recorded = (HERE / "figures.jsonl").read_text().splitlines()
    return {"request.svg": request(), "speed.svg": speed([json.loads(row) for row in recorded])}


if __name__ == "__main__":
    for name, drawing in pictures().items():
        (HERE / name).write_text(drawing)
