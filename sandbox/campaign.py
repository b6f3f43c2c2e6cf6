"""A comparison of many forms with the host CPU, spread over worker processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any

from sandbox.campaign_worker import Finding as Finding
from sandbox.decode import FORM_NAMES
from sandbox.errors import SandboxError

WINDOW = 8
"""Requests that wait for each worker: while one is slow, the others go on with those behind it."""


class Campaign:
    """Workers that compare forms; a context manager. On the fast path they try what ``policy``
    (a name or a file) allows, or all there is."""

    def __init__(
        self, packs: Iterable[str], jobs: int | None = None, policy: str | None = None
    ) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        settings = {"packs": list(packs), "policy": policy}
        self._workers = [_Worker(settings) for _ in range(self.jobs)]
        for worker in self._workers:
            self._free.put(worker)

    def run(
        self, requests: Iterable[tuple[str, int]], cases: int, seed: int
    ) -> Iterator[list[Finding]]:
        """The findings of each (tier, form), in the order of the requests."""
        pending = iter(requests)
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = [
                pool.submit(self._one, *request, cases, seed)
                for request in islice(pending, WINDOW * self.jobs)
            ]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [
                    pool.submit(self._one, *request, cases, seed) for request in islice(pending, 1)
                ]

    def _one(self, tier: str, code: int, cases: int, seed: int) -> list[Finding]:
        worker = self._free.get()
        try:
            return worker.ask(tier, code, cases, seed)
        finally:
            self._free.put(worker)

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *_exception: object) -> None:
        for worker in self._workers:
            worker.close()


class _Worker:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None

    def ask(self, tier: str, code: int, cases: int, seed: int) -> list[Finding]:
        """What the worker finds; if it dies, that the form crashes the process."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        request = {"tier": tier, "code": code, "cases": cases, "seed": seed}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return [Finding(**found) for found in json.loads(line)]
        self.close()
        if process.returncode > 0:
            raise SandboxError(f"a worker of the comparison failed at {FORM_NAMES[code]}")
        crash = f"crashes the process (signal {-process.returncode})"
        return [Finding(FORM_NAMES[code], tier, "", 1, 1, first=crash)]

    def _start(self) -> subprocess.Popen[str]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "sandbox.campaign_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._settings) + "\n")
        return process

    def close(self) -> None:
        """End the process; ``returncode`` tells how it ended if it was dead already."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        process.wait()
