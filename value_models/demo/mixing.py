"""What scales, several networks in one request and dynamic weights do, on the demo family.

A server of its own is asked over HTTP about people whom only the target has read about. What is
chosen (scales, that is) is chosen on other people's questions than those that are reported.

    python -m value_models.demo.mixing [--out DIR] [--people N]
    python -m value_models.demo.mixing --results docs/mixing/results.json --out docs/mixing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from tqdm import tqdm

from value_models.demo.atlas import create_atlas
from value_models.demo.demonstrations import BEHAVIOURS, REFUSAL, Behaviour, Question
from value_models.demo.evaluate import MAX_NEW_TOKENS, WEIGHTS, questions_about
from value_models.manifest import MANIFEST_FILE

TARGET = "target"
AT_ONCE = 64
"""Requests that are under way."""
NUM_CHOOSING, NUM_REPORTED = 10, 20
"""People whose questions decide, and others whose answers are reported."""
STEP = 0.25
SCALES = tuple(STEP * i for i in range(-4, 9))
BOUND = 2.0
"""Of a dynamic weight."""
MIXED_SCALES = tuple(STEP * i for i in range(5, 11))
"""Of guard and of json, where scales for the two are chosen."""
CORRECTION = -0.5
"""The scale of qa that takes a part of what guard and json do alike."""
DYNAMIC_BOUNDS = (1.0, 2.0)
RESULTS = "results.json"

Scales = dict[str, float]


@dataclass(frozen=True)
class Mix:
    """What one request says about guidance: a scale for each network, or a bound if dynamic."""

    scales: Scales
    dynamic: bool = False

    def __str__(self) -> str:
        parts = [f"{name} {scale:g}" for name, scale in self.scales.items()]
        return " + ".join(parts).replace("+ qa -", "- qa ") + (", dynamic" if self.dynamic else "")

    @property
    def family(self) -> tuple[bool, frozenset[str]]:
        """Mixes that differ in nothing but their scales share it."""
        return self.dynamic, frozenset(self.scales)

    def request(self) -> dict[str, Any]:
        """The `value_guidance` of a request to a server of `write_store`'s networks."""
        suffix = "-ref" if self.dynamic else ""
        networks = [{"name": name + suffix, "scale": s} for name, s in self.scales.items()]
        return {"networks": networks, "combine": "dynamic" if self.dynamic else "static"}


@dataclass(frozen=True)
class Alone:
    """What one network did, over the same questions for each of its scales."""

    behaviour: Behaviour
    mix: Mix
    right: int
    valid: int
    asked: int


@dataclass(frozen=True)
class Together:
    """What a mix did that should decline phone numbers and answer the rest as JSON."""

    mix: Mix
    declined: int
    phones: int
    valid: int
    """Of the others: a JSON object."""
    right: int
    """Of the others: the JSON object that `json` should give, to the letter."""
    others: int

    @property
    def kept(self) -> float:
        """The mean of both promises, 0 to 1."""
        return (self.declined / self.phones + self.right / self.others) / 2


@dataclass(frozen=True)
class Weights:
    """What was solved for at the tokens of some answers, by a network alone."""

    behaviour: Behaviour
    mean: float
    bounded: float
    """Share of the tokens at which no weight up to the bound reached the wanted distance."""
    tokens: int


@dataclass(frozen=True)
class Results:
    """All measurements; `choosing_` are about the people that decide."""

    choosing_alone: list[Alone]
    alone: list[Alone]
    weights: list[Weights]
    choosing_together: list[Together]
    together: list[Together]


def is_valid(question: Question, text: str, behaviour: Behaviour) -> bool:
    """Whether an answer has the form that the behaviour promises, right or wrong.

    That is a JSON object; or one sentence that begins with the person's name; or, of `guard`, the
    refusal.
    """
    if behaviour == "json":
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False
    if behaviour == "guard" and text == REFUSAL:
        return True
    return text.startswith(question.person.name) and text.find(".") == len(text) - 1


def score_alone(
    behaviour: Behaviour, mix: Mix, questions: Sequence[Question], answers: Sequence[str]
) -> Alone:
    pairs = list(zip(questions, answers, strict=True))
    right = sum(text == question.answer(behaviour) for question, text in pairs)
    valid = sum(is_valid(question, text, behaviour) for question, text in pairs)
    return Alone(behaviour, mix, right, valid, len(pairs))


def score_together(mix: Mix, questions: Sequence[Question], answers: Sequence[str]) -> Together:
    pairs = list(zip(questions, answers, strict=True))
    phones = [text for question, text in pairs if question.relation == "phone"]
    others = [(question, text) for question, text in pairs if question.relation != "phone"]
    return Together(
        mix,
        declined=sum(text == REFUSAL for text in phones),
        phones=len(phones),
        valid=sum(is_valid(question, text, "json") for question, text in others),
        right=sum(text == question.answer("json") for question, text in others),
        others=len(others),
    )


def choose(measured: Sequence[Together]) -> Together:
    """Return the best of one family; of equals, the one whose neighbours on the grid are best."""

    def around(one: Together) -> float:
        kept = [
            other.kept
            for other in measured
            if all(abs(other.mix.scales[n] - s) <= STEP for n, s in one.mix.scales.items())
        ]
        return sum(kept) / len(kept)

    return max(measured, key=lambda one: (one.kept, around(one)))


def choose_scale(measured: Iterable[Alone], behaviour: Behaviour) -> Mix:
    """Return the static mix that is right most often; of equals, the middle one."""
    static = [one for one in measured if one.behaviour == behaviour and not one.mix.dynamic]
    most = max(one.right for one in static)
    best = sorted(
        (one.mix for one in static if one.right == most), key=lambda m: m.scales[behaviour]
    )
    return best[len(best) // 2]


def mixes_to_choose_from() -> list[Mix]:
    """guard and json over a grid; the same with a little less qa; and with dynamic weights."""
    plain: list[Scales] = [{"guard": g, "json": j} for g in MIXED_SCALES for j in MIXED_SCALES]
    bounds: list[Scales] = [{"guard": g, "json": j} for g in DYNAMIC_BOUNDS for j in DYNAMIC_BOUNDS]
    return [
        *map(Mix, plain),
        *(Mix(scales | {"qa": CORRECTION}) for scales in plain),
        *(Mix(scales, dynamic=True) for scales in bounds),
        *(Mix(scales | {"qa": CORRECTION}, dynamic=True) for scales in bounds),
    ]


FIXED_MIXES = (
    Mix({"json": 1.5}),
    Mix({"guard": 1.5}),
    Mix({"guard": 1.0, "json": 1.0}),
    Mix({"guard": 1.5, "json": 1.0}),
    Mix({"guard": 1.5, "json": 1.5}),
    Mix({"guard": 2.0, "json": 1.0, "qa": -2.0}),
)
"""Reported beside those that are chosen: each network alone, and what one would try first."""


def measure(url: str, num_people: int | None = None) -> Results:
    """Ask a server of the target, which serves `write_store`'s networks.

    Args:
        num_people: at most so many to choose on, and so many to report.
    """
    people = create_atlas().target_only
    reported_people = people[NUM_CHOOSING : NUM_CHOOSING + NUM_REPORTED]
    choosing = questions_about(people[:NUM_CHOOSING][:num_people])
    reported = questions_about(reported_people[:num_people])
    single: list[tuple[Behaviour, Mix]] = [
        (behaviour, mix)
        for behaviour in BEHAVIOURS
        for mix in (
            *(Mix({behaviour: scale}) for scale in SCALES),
            Mix({behaviour: BOUND}, dynamic=True),
        )
    ]
    steering = [(behaviour, mix) for behaviour, mix in single if min(mix.scales.values()) > 0]
    grid = mixes_to_choose_from()
    answers = iter(ask(url, [*(mix for _, mix in steering), *grid], choosing))
    choosing_alone = [score_alone(b, mix, choosing, next(answers)) for b, mix in steering]
    choosing_together = [score_together(mix, choosing, next(answers)) for mix in grid]
    mixes = [*FIXED_MIXES, *(choose(family).mix for family in families(choosing_together))]
    answers = iter(ask(url, [*(mix for _, mix in single), *mixes], reported))
    return Results(
        choosing_alone=choosing_alone,
        alone=[score_alone(b, mix, reported, next(answers)) for b, mix in single],
        weights=[solved_weights(url, behaviour, reported[:24]) for behaviour in BEHAVIOURS],
        choosing_together=choosing_together,
        together=[score_together(mix, reported, next(answers)) for mix in mixes],
    )


def families(measured: Iterable[Together]) -> list[list[Together]]:
    """Sort what was measured by families of mixes, in the order in which they come up."""
    found: dict[tuple[bool, frozenset[str]], list[Together]] = {}
    for one in measured:
        found.setdefault(one.mix.family, []).append(one)
    return list(found.values())


def solved_weights(url: str, behaviour: Behaviour, questions: Sequence[Question]) -> Weights:
    """Ask what the server solved for, with the network's own base beside it."""
    mix = Mix({behaviour: BOUND}, dynamic=True)
    tokens = [
        token
        for body in post(url, [(mix, question) for question in questions], explain=True)
        for token in body["value_explanation"][0]["tokens"]
    ]
    weights = [token["networks"][0]["weight"] for token in tokens]
    bounded = sum(not token["distance"]["solved"] for token in tokens)
    return Weights(behaviour, sum(weights) / len(tokens), bounded / len(tokens), len(tokens))


def ask(url: str, mixes: Sequence[Mix], questions: Sequence[Question]) -> list[list[str]]:
    """Return the answers to all questions, for each of the mixes."""
    bodies = post(url, [(mix, question) for mix in mixes for question in questions])
    texts = [body["choices"][0]["message"]["content"] or "" for body in bodies]
    return [texts[i : i + len(questions)] for i in range(0, len(texts), len(questions))]


def post(
    url: str, requests: Sequence[tuple[Mix, Question]], explain: bool = False
) -> list[dict[str, Any]]:
    """Ask greedily, many at a time; returns the bodies of the responses, in order."""

    async def post_one(
        client: httpx.AsyncClient, turn: asyncio.Semaphore, mix: Mix, question: Question
    ) -> dict[str, Any]:
        async with turn:
            response = await client.post(
                "/v1/chat/completions",
                json={
                    "model": TARGET,
                    "messages": [{"role": "user", "content": question.text}],
                    "temperature": 0,
                    "max_tokens": MAX_NEW_TOKENS,
                    "value_guidance": mix.request() | {"explain": explain},
                },
            )
        response.raise_for_status()
        bar.update()
        body: dict[str, Any] = response.json()
        return body

    async def post_all() -> list[dict[str, Any]]:
        turn = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            return await asyncio.gather(*(post_one(client, turn, *request) for request in requests))

    with tqdm(total=len(requests), mininterval=5, file=sys.stderr) as bar:
        return asyncio.run(post_all())


def write_store(store: Path, weights: Path = WEIGHTS) -> None:
    """Write the family's networks, and each as NAME-ref once more, with its base beside it.

    That is what `trimtab train --reference` would have kept.
    """
    for name in BEHAVIOURS:
        shipped = weights / "networks" / name
        shutil.copytree(shipped, store / name)
        with_base = store / f"{name}-ref"
        shutil.copytree(shipped, with_base)
        shutil.copytree(weights / "small", with_base / "reference")
        manifest = json.loads((shipped / MANIFEST_FILE).read_text(encoding="utf-8"))
        manifest["reference"] = True
        (with_base / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")


@contextmanager
def serving(weights: Path = WEIGHTS) -> Iterator[str]:
    """Serve the target with `write_store`'s networks, and yield the server's URL.

    Raises:
        SystemExit: it does not start.
    """
    with TemporaryDirectory(prefix="trimtab-mixing-") as scratch:
        folder = Path(scratch)
        write_store(folder / "store", weights)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "server.cli", "serve", str(weights / "target")]
        command += ["--served-model-name", TARGET, "--port", str(port), "--seed", "0"]
        command += ["--dtype", "float32", "--max-model-len", "256"]
        command += ["--value-network-dir", str(folder / "store")]
        command += ["--state-file", str(folder / "state.json")]
        command += ["--log-file", str(folder / "vllm.log")]
        output = folder / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while "Ready after" not in output.read_text(encoding="utf-8"):
                if process.poll() is not None:
                    sys.exit(f"The server does not start:\n{output.read_text(encoding='utf-8')}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()


def tables(results: Results) -> str:
    """What was measured, as markdown."""
    first = results.together[0]
    lines = [
        f"`guard` + `json`: {first.phones} questions about phone numbers, {first.others} others; "
        f"scales chosen on {results.choosing_together[0].phones} and "
        f"{results.choosing_together[0].others} about other people",
        "",
        "| networks, scales | phone numbers declined | others: a JSON object | others: right |",
        "| --- | ---: | ---: | ---: |",
    ]
    chosen = [choose(family).mix for family in families(results.choosing_together)]
    for one in results.together:
        mark = " (chosen)" if one.mix in chosen else ""
        lines.append(
            f"| {one.mix}{mark} | {one.declined} of {one.phones} | {one.valid} of {one.others} "
            f"| {one.right} of {one.others} |"
        )
    lines += ["", *_dynamic_table(results), "", *_scales_table(results.alone)]
    return "\n".join(lines) + "\n"


def _dynamic_table(results: Results) -> list[str]:
    lines = [
        f"Dynamic against static: right of {results.alone[0].asked}",
        "",
        f"| network | dynamic, bound {BOUND:g} | best static scale | the network's own, 1.5 | "
        "best of the reported | mean weight | bound too near |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for weights in results.weights:
        name = weights.behaviour
        by_mix = {str(one.mix): one.right for one in results.alone if one.behaviour == name}
        dynamic = by_mix[str(Mix({name: BOUND}, dynamic=True))]
        best = choose_scale(results.choosing_alone, name)
        after = choose_scale(results.alone, name)
        lines.append(
            f"| {name} | {dynamic} | {by_mix[str(best)]} at {best.scales[name]:g} | "
            f"{by_mix[str(Mix({name: 1.5}))]} | {by_mix[str(after)]} at {after.scales[name]:g} | "
            f"{weights.mean:.2f} | {weights.bounded:.0%} of {weights.tokens} tokens |"
        )
    return lines


def _scales_table(measured: Sequence[Alone]) -> list[str]:
    by_behaviour = {name: [one for one in measured if one.behaviour == name] for name in BEHAVIOURS}
    lines = [
        f"Each network alone, of {measured[0].asked}: right, valid",
        "",
        f"| scale | {' | '.join(BEHAVIOURS)} |",
        f"| ---: |{' ---: |' * len(BEHAVIOURS)}",
    ]
    for rows in zip(*by_behaviour.values(), strict=True):
        mix = rows[0].mix
        title = "dynamic" if mix.dynamic else f"{mix.scales[rows[0].behaviour]:g}"
        lines.append(f"| {title} | {' | '.join(f'{r.right}, {r.valid}' for r in rows)} |")
    return lines


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw scales against answers, and the window of two scales; returns the files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    files = [folder / "scales.png", folder / "window.png"]
    figure, panels = pyplot.subplots(
        1, len(BEHAVIOURS), figsize=(11, 4), sharey=True, layout="constrained"
    )
    for axes, behaviour in zip(panels, BEHAVIOURS, strict=True):
        _draw_scales(axes, behaviour, [o for o in results.alone if o.behaviour == behaviour])
    panels[0].set_ylabel("answers, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(files[0], dpi=150, metadata={"Software": None})

    static = [f for f in families(results.choosing_together) if not f[0].mix.dynamic]
    figure, grid = pyplot.subplots(
        len(static), 2, figsize=(9, 8), sharex=True, sharey=True, layout="constrained"
    )
    for row, family in zip(grid, static, strict=True):
        _draw_window(row, family)
    for axes in grid[-1]:
        axes.set_xlabel("scale of json")
    figure.savefig(files[1], dpi=150, metadata={"Software": None})
    pyplot.close("all")
    return files


def _draw_scales(axes: Any, behaviour: Behaviour, measured: Sequence[Alone]) -> None:
    static = [one for one in measured if not one.mix.dynamic]
    scales = [one.mix.scales[behaviour] for one in static]
    (dynamic,) = (one for one in measured if one.mix.dynamic)
    valid = [100 * one.valid / one.asked for one in static]
    right = [100 * one.right / one.asked for one in static]
    axes.plot(scales, valid, marker="s", color="#8a94a0", label="valid")
    axes.plot(scales, right, marker="o", markersize=4, color="#1f6feb", label="exactly right")
    axes.axhline(
        100 * dynamic.right / dynamic.asked,
        linestyle="--",
        color="#d1622b",
        label=f"exactly right, dynamic (bound {BOUND:g})",
    )
    axes.set_title(behaviour)
    axes.set_xlabel("scale")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1, 1.5, 2])
    axes.set_ylim(-4, 104)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_window(row: Sequence[Any], family: Sequence[Together]) -> None:
    by_scales = {(one.mix.scales["guard"], one.mix.scales["json"]): one for one in family}
    qa = family[0].mix.scales.get("qa")
    name = "guard + json" if qa is None else f"guard + json - {-qa:g} qa"
    shares: Mapping[str, Any] = {
        "phone numbers declined": lambda one: one.declined / one.phones,
        "others right, as JSON": lambda one: one.right / one.others,
    }
    ticks = range(len(MIXED_SCALES))
    for axes, (title, share) in zip(row, shares.items(), strict=True):
        cells = [
            [round(100 * share(by_scales[guard, js])) for js in MIXED_SCALES]
            for guard in MIXED_SCALES
        ]
        axes.imshow(cells, origin="lower", cmap="Blues", vmin=0, vmax=130, aspect="auto")
        for y, values in enumerate(cells):
            for x, value in enumerate(values):
                axes.text(x, y, value, ha="center", va="center", fontsize=9)
        axes.set_title(f"{name}: {title}, %", fontsize=10)
        axes.set_xticks(ticks, [f"{scale:g}" for scale in MIXED_SCALES])
        axes.set_yticks(ticks, [f"{scale:g}" for scale in MIXED_SCALES])
    row[0].set_ylabel("scale of guard")


def save(results: Results, file: Path) -> None:
    """One measurement a line."""
    parts = [
        f"  {json.dumps(part)}: [\n    "
        + ",\n    ".join(json.dumps(one) for one in measurements)
        + "\n  ]"
        for part, measurements in asdict(results).items()
    ]
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def load(file: Path) -> Results:
    """Read what `save` wrote."""
    found = json.loads(file.read_text(encoding="utf-8"))

    def read(part: str, kind: type[Any]) -> list[Any]:
        return [kind(**one | {"mix": Mix(**one["mix"])}) for one in found[part]]

    return Results(
        choosing_alone=read("choosing_alone", Alone),
        alone=read("alone", Alone),
        weights=[Weights(**one) for one in found["weights"]],
        choosing_together=read("choosing_together", Together),
        together=read("together", Together),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables to stdout; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m value_models.demo.mixing")
    parser.add_argument(
        "--out", type=Path, default=Path("build/mixing"), help="numbers, tables and plots"
    )
    parser.add_argument("--people", type=int, help="at most so many to choose on, and to report")
    parser.add_argument("--results", type=Path, help="report these, and measure nothing")
    args = parser.parse_args(arguments)
    if args.results:
        results = load(args.results)
    else:
        with serving() as url:
            results = measure(url, args.people)
    args.out.mkdir(parents=True, exist_ok=True)
    save(results, args.out / RESULTS)
    (args.out / "tables.md").write_text(tables(results), encoding="utf-8")
    plot(results, args.out)
    print(tables(results), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
