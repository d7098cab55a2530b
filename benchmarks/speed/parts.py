"""The parts of the benchmark: each measures one row or group of rows of the table, inside a child process.

A part returns plain rows for the JSON record; what they should be is in `table`.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.speed import contestants, limits, machine, structures, timing
from benchmarks.speed.contestants import MD17, Ours, TorchMDNetRival
from benchmarks.speed.structures import Inputs

#: Bytes per directed edge that an implementation with materialized edge tensors holds at its peak (some more than what
#: torchmd-net was seen to hold), and the share of the free memory that may be asked for.
BYTES_PER_EDGE = {"train": 420_000, "inference": 110_000}
MEMORY_SHARE = 0.8

TRAIN = [("aspirin", 8), ("aspirin", 32), ("aspirin", 128), ("aspirin", 1), ("ethanol", 8), ("ethanol", 32)]
INFER = [("aspirin", 1), ("aspirin", 8), ("aspirin", 32)]
CLUSTERS = [32, 64, 128, 256, 512]
BOXES = [(4, 4, 4), (5, 5, 5), (6, 6, 6), (7, 7, 7), (8, 8, 8), (9, 9, 8)]
PAIR_BATCHES = [8, 128]


@dataclass(frozen=True)
class Settings:
    """How long and how much to measure.

    Attributes
    ----------
    rounds
        Interleaved rounds.
    quick
        Smaller sizes only: to see that everything works, not to quote.
    baseline
        ``"shipped"``, ``"allocator"`` or ``"strict"``.
    threads
        Threads of torch; with more than one the clock is wall time.
    plan
        Execution plan of ours; None: the best there is.
    """

    rounds: int = 9
    quick: bool = False
    baseline: str = "shipped"
    threads: int = 1
    plan: str | None = None

    @property
    def clock(self) -> Callable[[], float]:
        """What times are taken with."""
        return time.process_time if self.threads == 1 else time.perf_counter


def run_rounds(works: dict[str, Callable], inputs: list[Any], settings: Settings) -> dict[str, Any]:
    """Times of interleaved rounds and the ratios to ours; no contestant may change global settings."""
    before = machine.global_settings()
    times = timing.interleave(works, inputs, settings.rounds, settings.clock)
    if machine.global_settings() != before:
        raise RuntimeError(f"a contestant changed global settings: {before} -> {machine.global_settings()}")
    first = next(iter(works))
    ratios = {name: timing.ratio(times, name, first) for name in works if name != first}
    return {"times": timing.summary(times), "ratios": ratios}


def _row(
    item: str, work: str, inputs: Inputs, agreement: dict[str, Any] | None = None, **values: Any
) -> dict[str, Any]:
    """What every row says: the item, the size, what the limit is made of, how well the contestants agree."""
    n_atoms, n_edges = len(inputs.z), structures.edges_within(inputs)
    flops = limits.required_flops(work, n_atoms, n_edges, MD17)
    return {
        "item": item,
        "atoms": n_atoms,
        "edges": n_edges,
        "required_gflop": flops / 1e9,
        "agreement": agreement,
        **values,
    }


def _say(row: dict[str, Any]) -> None:
    """A line on the terminal as soon as there is one."""
    times = ", ".join(f"{name} {t['ms']:.2f} ms" for name, t in row.get("times", {}).items())
    ratios = ", ".join(
        f"{name} / ours {r['median']:.2f} [{r['quartiles'][0]:.2f}, {r['quartiles'][1]:.2f}]"
        for name, r in row.get("ratios", {}).items()
    )
    agreement = row.get("agreement") or {}
    errors = "; ".join(
        f"{who}: " + ", ".join(f"{k} {v:.1e}" for k, v in e.items()) for who, e in agreement.items() if who != "ok"
    )
    print(f"{row['item']}: {times}; {ratios}" + (f"\n    relative differences {errors}" if errors else ""), flush=True)


def _checked(
    ours: Ours, rival: TorchMDNetRival | None, inputs: Inputs, item: str, gradients: bool = True
) -> dict[str, Any]:
    """Agreement of the contestants; a disagreement ends the benchmark, for a speed of other numbers means nothing."""
    agreement = contestants.compare(ours, rival, inputs, gradients)
    if not agreement["ok"]:
        raise RuntimeError(f"{item}: the contestants disagree: {agreement}")
    return agreement


def _rival(**options: Any) -> TorchMDNetRival | None:
    """torchmd-net, if it is installed."""
    return TorchMDNetRival(**options) if contestants.torchmd_net_version() else None


def _fits(work: str, n_edges: int) -> bool:
    """Whether edge tensors of this size fit into the free memory."""
    return BYTES_PER_EDGE[work] * n_edges < MEMORY_SHARE * machine.memory_bytes("MemAvailable")


# --------------------------------------------------------------------------------------------------- steps, inference


def train(settings: Settings) -> list[dict[str, Any]]:
    """Training steps on energies and forces. Batch 8 of aspirin also against our eager plan and their own AdamW."""
    rows = []
    for molecule, n in TRAIN[:1] if settings.quick else TRAIN:
        item = f"{molecule} b{n}"
        sets = structures.molecule_sets(molecule, n)
        # The eager plan's edge tensors hold all pairs, and what one contestant frees the other may not get back.
        plan = settings.plan or contestants.best_plan()
        if not _fits("train", structures.edges_within(sets[0]) + (len(sets[0].batch.src) if plan == "eager" else 0)):
            print(f"{item}: edge tensors do not fit into memory; left out", flush=True)
            continue
        ours, rival = Ours(plan=plan), _rival()
        agreement = _checked(ours, rival, sets[0].first(8), item)
        works = {"ours": ours.step}
        if rival is not None:
            works["torchmd-net"] = rival.step
        if (molecule, n) == ("aspirin", 8):
            if rival is not None and settings.baseline == "shipped":
                works["torchmd-net, own AdamW"] = TorchMDNetRival(own_optimizer=True).step
            if ours.plan != "eager":
                works["ours, eager"] = Ours(plan="eager").step
        rows.append(_row(item, "train", sets[0], agreement, plan=ours.plan, **run_rounds(works, sets, settings)))
        _say(rows[-1])
        del ours, rival, works
        gc.collect()
    return rows


def ndem(settings: Settings) -> list[dict[str, Any]]:
    """The NDeM step against torchmd-net with a naive second forward pass, and against our own supervised step."""
    sets = structures.molecule_sets("aspirin", 8)
    ours, rival = Ours("ndem", settings.plan), _rival(objective="ndem")
    works = {"ours": ours.step, "ours, supervised": Ours(plan=settings.plan).step}
    agreement = None
    if rival is not None:
        agreement = ndem_agreement(ours, rival, sets[0])
        works["torchmd-net"] = rival.step
    row = _row("aspirin b8", "ndem", sets[0], agreement, plan=ours.plan, **run_rounds(works, sets, settings))
    _say(row)
    return [row]


def ndem_agreement(ours: Ours, rival: TorchMDNetRival, inputs: Inputs) -> dict[str, Any]:
    """Relative differences of both contestants: energies and forces as always; the NDeM term alone, and its gradient.

    The noise is the same float32 draw for both; there is no float64 column for it.
    """
    found = {}
    for name, entrant in (("ours", ours), ("torchmd-net", rival)):
        entrant.zero_grad()
        term = entrant.terms(inputs)["ndem"]
        entrant.backward(term)
        found[name] = {"NDeM term": term.detach().double(), "its gradient": contestants.flat_gradients(entrant)}
        entrant.zero_grad()
    between = contestants.differences(found["ours"], found["torchmd-net"])
    agreement = contestants.compare(ours, rival, inputs, gradients=False)
    ok = agreement.pop("ok") and all(v <= 2 * contestants.TOLERANCE["gradient"] for v in between.values())
    agreement["ours - torchmd-net"] |= between
    if not ok:
        raise RuntimeError(f"NDeM: the contestants disagree: {agreement}")
    return agreement | {"ok": ok}


def infer(settings: Settings) -> list[dict[str, Any]]:
    """Energies and forces with frozen weights."""
    rows = []
    for molecule, n in INFER[1:2] if settings.quick else INFER:
        item = f"{molecule} b{n}"
        sets = structures.molecule_sets(molecule, n)
        ours, rival = Ours(plan=settings.plan), _rival()
        works = _frozen(ours, rival, "infer")
        agreement = _checked(ours, rival, sets[0], item, gradients=False)
        rows.append(_row(item, "inference", sets[0], agreement, plan=ours.plan, **run_rounds(works, sets, settings)))
        _say(rows[-1])
    return rows


def _frozen(ours: Ours, rival: TorchMDNetRival | None, method: str) -> dict[str, Callable]:
    """The contestants' inference, weights frozen."""
    entrants = {"ours": ours} | ({} if rival is None else {"torchmd-net": rival})
    for entrant in entrants.values():
        entrant.freeze()
    return {name: getattr(entrant, method) for name, entrant in entrants.items()}


# --------------------------------------------------------------------------------------------------- single systems


def systems(settings: Settings) -> list[dict[str, Any]]:
    """One system at a time: inference, neighbor list included in both, of clusters and of periodic boxes of water."""
    makers = [(f"cluster of {n}", lambda n=n: structures.cluster_sets(n)) for n in CLUSTERS]
    makers += [(f"water box of {3 * np.prod(c)}", lambda c=c: structures.water_sets(c)) for c in BOXES]
    chosen = [makers[0], makers[2], makers[5]] if settings.quick else makers
    return [row for item, make in chosen if (row := _system(item, make(), settings, "inference")) is not None]


def system_steps(settings: Settings) -> list[dict[str, Any]]:
    """A training step on one periodic box of water, as far as the memory goes."""
    boxes = BOXES[:1] if settings.quick else BOXES
    rows = (_system(f"water box of {3 * np.prod(c)}", structures.water_sets(c), settings, "train") for c in boxes)
    return [row for row in rows if row is not None]


def _system(item: str, sets: list[Inputs], settings: Settings, work: str) -> dict[str, Any] | None:
    """One size; a contestant whose edge tensors do not fit into the memory is left out, and it is said."""
    plan = settings.plan or contestants.best_plan()
    fits = _fits(work, max(structures.edges_within(s) for s in sets))
    if not fits:
        print(f"{item}: edge tensors do not fit into memory; torchmd-net and the eager plan are left out", flush=True)
        if plan == "eager":
            return None
    room = 8 * (max(structures.most_neighbors(s) for s in sets) // 8 + 1) + 8  # and the atom itself
    ours, rival = Ours(plan=plan), _rival(max_num_neighbors=room) if fits else None
    if work == "inference":
        works = _frozen(ours, rival, "infer_from_positions")
    else:
        works = {"ours": ours.step} | ({} if rival is None else {"torchmd-net": rival.step})
    agreement = None
    if _fits(work, 2 * len(sets[0].batch.src)):  # the float64 truth is made by the eager plan
        agreement = _checked(ours, rival, sets[0], item, gradients=work == "train")
    row = _row(item, work, sets[0], agreement, plan=ours.plan, **run_rounds(works, sets, settings))
    _say(row)
    del ours, rival, works
    gc.collect()
    return row


# --------------------------------------------------------------------------------------------------------- data path


def pairs(settings: Settings) -> list[dict[str, Any]]:
    """Neighbor pairs of aspirin within 5 Å: microseconds per molecule by every way that is installed."""
    rows = []
    for n in PAIR_BATCHES[:1] if settings.quick else PAIR_BATCHES:
        sets = structures.molecule_sets("aspirin", n)
        row = {"item": f"aspirin b{n}", **run_rounds(_pair_makers(), sets, settings)}
        row["us_per_molecule"] = {name: 1e3 * t["ms"] / n for name, t in row["times"].items()}
        rows.append(row)
        print(row["item"], {name: f"{us:.2f} µs" for name, us in row["us_per_molecule"].items()}, flush=True)
    return rows


def _pair_makers() -> dict[str, Callable[[Inputs], Any]]:
    """Ways from positions to pairs: "ours" is what a training step calls."""
    from ndem_zoo.graph import edges_of, neighbor_list

    cutoff = structures.CUTOFF

    def one_by_one(inputs: Inputs) -> None:
        for pos in np.split(inputs.pos, np.cumsum(inputs.counts)[:-1]):
            neighbor_list(pos, cutoff)

    def distances(inputs: Inputs) -> None:
        pos = inputs.batch.pos.view(len(inputs.counts), -1, 3)
        (torch.cdist(pos, pos) < cutoff).nonzero()

    def within(inputs: Inputs) -> None:
        src, dst, _, _ = edges_of(inputs.pos, inputs.counts, cutoff)
        near = np.square(inputs.pos[src] - inputs.pos[dst]).sum(axis=1) < cutoff**2
        src[near], dst[near]

    makers = {
        "ours": lambda inputs: edges_of(inputs.pos, inputs.counts, cutoff),
        "ours, then only those within the cutoff": within,
        "vesin, molecule by molecule": one_by_one,
        "torch.cdist": distances,
    }
    if machine.version("torch-cluster") is not None:
        from torch_cluster import radius_graph

        makers["torch_cluster"] = lambda inputs: radius_graph(
            inputs.batch.pos, cutoff, inputs.batch.system, max_num_neighbors=32
        )
    if contestants.torchmd_net_version() is not None:
        from torchmdnet.models.utils import OptimizedDistance

        distance = OptimizedDistance(0.0, cutoff, max_num_pairs=-32, return_vecs=True, loop=True)
        makers["torchmd-net"] = lambda inputs: distance(inputs.batch.pos, inputs.batch.system)
    return makers


def fit(settings: Settings) -> list[dict[str, Any]]:
    """A whole `fit` (data path, log, weight average, a row of history each epoch) against its bare step.

    The set-up of a training is taken out: times are differences between a long and a short one. Also the share of a step
    that goes into making its batch.
    """
    rows = []
    for objective in ["supervised"] if settings.quick else ["supervised", "ndem"]:
        rows.append({"item": f"{objective}, aspirin b8", **_fit_rounds(objective, settings)})
        print(rows[-1]["item"], {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, float)}, flush=True)
    return rows


def _fit_rounds(objective: str, settings: Settings) -> dict[str, Any]:
    """Rounds of: bare steps, a short fit, a long fit, batches."""
    from ndem_zoo import NDeMTorchMDNet
    from ndem_zoo.sampling import collate

    data = structures.sample("aspirin")[:200]
    short, long = (2, 6) if settings.quick else (5, 30)
    chosen = {} if settings.plan is None else {"plan": settings.plan}  # a keyword of versions that have plans
    model = NDeMTorchMDNet(
        preset="md17_paper", objective=objective, ema_decay=0.999, device="cpu", progress=False, batch_size=8, **chosen
    )

    def fitted(steps: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.fit(data, max_steps=steps, checkpoint_dir=folder)

    fitted(1)
    bare = BareStep(model, data)
    indices = [np.arange(8 * i, 8 * i + 8) for i in range(25)]
    rounds = []
    clock = settings.clock
    for _ in range(settings.rounds):
        marks = [clock()]
        for work in (
            lambda: [bare.step() for _ in range(long - short)],
            lambda: fitted(short),
            lambda: fitted(long),
            lambda: [collate(data, i, structures.CUTOFF) for i in indices],
        ):
            work()
            marks.append(clock())
        bare_s, short_s, long_s, batches_s = np.diff(marks)
        step = bare_s / (long - short)
        rounds.append(((long_s - short_s) / (long - short), step, batches_s / len(indices)))
    whole, step, batch = np.array(rounds).T
    return {
        "bare_ms": float(1e3 * np.median(step)),
        "fit_ms": float(1e3 * np.median(whole)),
        "throughput": float(np.median(step / whole)),
        "throughput_quartiles": timing.quartiles(list(map(float, step / whole))),
        "batch_ms": float(1e3 * np.median(batch)),
        "data_share": float(np.median(batch / step)),
        "rounds": settings.rounds,
    }


class BareStep:
    """The step of a fitted estimator and nothing else: batches made beforehand, no average, no log."""

    def __init__(self, model: Any, data: Any) -> None:
        from ndem_zoo.sampling import collate

        self.potential, self.objective = model.potential_.train(), model.objective_
        self.weights = contestants.kept(self.potential, self.objective)
        self.optimizer = contestants.adamw(self.weights.groups)
        self.batches = [collate(data, np.arange(8 * i, 8 * i + 8), structures.CUTOFF) for i in range(len(data) // 8)]
        self.rng, self.n = torch.Generator().manual_seed(0), 0

    def step(self) -> None:
        """One step, on the next batch."""
        self.weights.zero_grad()
        batch = self.batches[self.n % len(self.batches)]
        with self.weights.forward():
            loss = sum(self.objective(self.potential, batch, self.rng).values())
        loss.backward(inputs=self.weights.inputs)
        self.optimizer.step()
        self.n += 1


#: Parts that run inside a child process of a baseline, and the baselines that they mean something in.
PARTS: dict[str, tuple[Callable[[Settings], list[dict[str, Any]]], tuple[str, ...]]] = {
    "train": (train, ("shipped", "allocator", "strict")),
    "ndem": (ndem, ("shipped", "allocator", "strict")),
    "infer": (infer, ("shipped", "allocator", "strict")),
    "systems": (systems, ("shipped", "allocator", "strict")),
    "system-steps": (system_steps, ("shipped", "strict")),
    "pairs": (pairs, ("shipped",)),
    "fit": (fit, ("shipped", "allocator")),
}
