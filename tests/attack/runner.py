"""Runs many cases in processes of their own, of which none can take the others along, and counts."""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from tests.attack.cases import Result
from tests.attack.surfaces import SURFACES, run

#: A case takes milliseconds; one that takes so many seconds hangs.
PATIENCE = 120.0


@dataclass
class Totals:
    """What came of many cases, by surface: how many there were, in how many something agreed, outcomes and actions."""

    agreeing: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    actions: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.cases[result.surface] += 1
        self.agreeing[result.surface] += result.outcomes["agreed"] > 0
        self.outcomes.setdefault(result.surface, Counter()).update(result.outcomes)
        self.actions.setdefault(result.surface, Counter()).update(result.actions)
        if result.failure:
            self.failures.append(result)

    def __str__(self) -> str:
        lines = []
        for surface, count in sorted(self.cases.items()):
            lines.append(f"{surface}: {count} cases, in {self.agreeing[surface]} of which something agreed")
            lines.append(f"    outcomes: {listed(self.outcomes[surface])}")
            lines.append(f"    actions: {listed(self.actions[surface])}")
        lines.append(f"{sum(self.cases.values())} cases, {len(self.failures)} failures")
        return "\n".join([*lines, *(failure.replay for failure in self.failures)])


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def sequence(surfaces: Sequence[str], first: int) -> Iterator[tuple[str, int]]:
    """All cases, in an order that does not depend on who runs them."""
    seed = first
    while True:
        for surface in surfaces:
            yield surface, seed
        seed += 1


def serve(connection: Connection) -> None:
    """A worker: plays what it is told until it is told nothing; tells the result, and the processor time it has had."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while (told := connection.recv()) is not None:
        connection.send((run(*told), time.process_time()))


@dataclass
class Worker:
    """A process, the case that it plays, and the seconds of a processor that it has had."""

    context: Any
    process: Any = None
    connection: Any = None
    playing: tuple[str, int] | None = None
    since: float = 0.0
    spent: float = 0.0

    def start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def play(self, told: tuple[str, int]) -> None:
        self.playing, self.since = told, time.monotonic()
        self.connection.send(told)

    def lost(self, reason: str) -> Result:
        """What a case is whose process died or hangs; another process takes its place."""
        assert self.playing is not None
        self.process.kill()
        self.process.join()
        result = Result(*self.playing, Counter(), Counter(), "?")
        self.start()
        return Result(*self.playing, Counter(), Counter(), f"{result.replay}\n  {reason}")


def attack(
    surfaces: Sequence[str], cases: int, seconds: float, processes: int, first: int, output: Any = sys.stdout
) -> Totals:
    """Runs cases until there were so many, or each process has had so many seconds of a processor.

    The time of a processor is what counts, because processes that share the machine with others play as much.
    """
    context: Any = multiprocessing.get_context("spawn")
    workers = [Worker(context) for _ in range(processes)]
    for worker in workers:
        worker.start()
    todo, given, totals = sequence(surfaces, first), 0, Totals()

    def done(worker: Worker, result: Result) -> None:
        totals.add(result)
        worker.playing = None
        if result.failure:
            print(result.failure, file=output, flush=True)
        if sum(totals.cases.values()) % 1000 == 0:
            print(f"{sum(totals.cases.values())} cases, {len(totals.failures)} failures", file=sys.stderr, flush=True)

    while True:
        for worker in workers:
            if worker.playing is None and given < cases and worker.spent < seconds:
                worker.play(next(todo))
                given += 1
        busy = {worker.connection: worker for worker in workers if worker.playing is not None}
        if not busy:
            break
        for ready in wait(list(busy), timeout=1.0):
            worker = busy[ready]
            try:
                result, worker.spent = worker.connection.recv()
                done(worker, result)
            except (EOFError, OSError):
                worker.process.join()
                done(worker, worker.lost(f"the process died: exit code {worker.process.exitcode}"))
        for worker in workers:
            if worker.playing is not None and time.monotonic() - worker.since > PATIENCE:
                done(worker, worker.lost(f"it takes more than {PATIENCE:.0f} seconds"))
    for worker in workers:
        worker.connection.send(None)
        worker.process.join()
    return totals


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description="Random programs against PyTorch.")
    parser.add_argument("--surface", action="append", choices=list(SURFACES), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="play this case alone, in this process, and say what it consists of")
    parser.add_argument("--show", action="store_true", help="with --seed: what the case consists of, if it passes too")
    parser.add_argument("--cases", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a processor, for each process")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    options = parser.parse_args(arguments)
    surfaces = options.surface or list(SURFACES)
    if options.seed is not None:
        results = [run(surface, options.seed) for surface in surfaces]
        for result in results:
            if options.show and not result.failure:
                print("\n".join(result.log))
            print(result.failure or f"{result.replay}: {listed(result.outcomes)}")
        return int(any(result.failure for result in results))
    totals = attack(surfaces, options.cases, options.seconds, options.processes, options.first)
    print(totals)
    return int(bool(totals.failures))
